"""ONNX -> engine plan with TensorRT or TensorRT-RTX, in a process of its own.

A process each, because a failed build leaves the library in a state in which the next one fails
too, and because a builder's memory is not all given back. The same code serves both libraries and
both API generations (10.x, 11.x): it names no precision flag, the ONNX carries the types.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from sdcompile import isolated
from sdcompile.errors import HostError, StageError
from sdcompile.files import write_whole
from sdcompile.spec import Say

TABLE = "Layers:\n"
"""How the message starts that holds the layer table."""

_CAPTURABLE = "REQUIRE_USER_ALLOCATION"
"""The flag of an engine that must be fit for CUDA graphs."""

Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Order:
    """One engine to build; picklable.

    module        "tensorrt_rtx" or "tensorrt"
    version       what `module` has to be
    onnx, plan    the files read and written; `log` gets the messages as they come and `table` the layer table, as text
    profile       input name -> (min, opt, max) shape
    target        compute capability of TensorRT-RTX's AOT build ("SM89"), None for its portable engine
    flags         names of BuilderFlag to set
    settings      attributes of IBuilderConfig to set; a value "Enum.MEMBER" names a member of the module's enum
    workspace     bytes, None for the library's choice
    timing_cache  file that kernel timings are read from and written to, None for none
    """

    module: str
    version: str
    onnx: Path
    plan: Path
    log: Path
    table: Path
    profile: Profile
    target: str | None = None
    flags: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    workspace: int | None = None
    timing_cache: Path | None = None


def compile_plan(order: Order, say: Say, name: str) -> int:
    """Build `order` in a process of its own; returns that process's peak resident bytes.

    Raises StageError with the library's own words when it refuses the graph or the target.
    """
    return isolated.run(partial(work, order), say, name)


def work(order: Order, say: Say) -> None:
    """Build `order` in this process, which should end soon after."""
    trt = import_module(order.module)
    if trt.__version__ != order.version:
        raise HostError(f"{order.module} {trt.__version__} was loaded where {order.version} is installed")
    log = _log(trt, order.log)
    builder = trt.Builder(log)
    network = builder.create_network(_typed(trt))
    parse(trt, network, log, order.onnx)
    config = configure(trt, builder, network, order)
    monitor = _monitor(trt, say)
    config.progress_monitor = monitor
    if order.timing_cache is not None:
        _read_timings(config, order.timing_cache)
    with order.plan.open("wb") as file:
        built = builder.build_serialized_network_to_stream(network, config, _writer(trt, file))
    if monitor.stopped.is_set():
        raise KeyboardInterrupt
    if not built:
        # RTX can tell only here that a graph allocates while it runs (data-dependent shapes).
        hint = "build it with `build: {cuda_graphs: false}`" if _CAPTURABLE in log.reason() else ""
        raise StageError(f"{order.module} cannot build {order.plan.stem}: {log.reason()}", hint)
    if order.timing_cache is not None:
        _keep_timings(config, order.timing_cache)
    order.table.write_text(log.table or _inspected(trt, log, order), encoding="utf-8")


def parse(trt: Any, network: Any, log: Any, onnx: Path) -> None:
    """Read `onnx` into `network`. Raises StageError with every complaint of the parser."""
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        complaints = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise StageError(f"{trt.__name__} does not take this graph: {'; '.join(complaints) or log.reason()}")


def configure(trt: Any, builder: Any, network: Any, order: Order) -> Any:
    """The builder config of `order`. Raises StageError when the profile does not fit the network."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # TF32 would make "fp32" mean 10 bits of mantissa.
    config.clear_flag(trt.BuilderFlag.TF32)
    for name in order.flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    for name, value in order.settings.items():
        enum, _, member = value.partition(".") if isinstance(value, str) else ("", "", "")
        setattr(config, name, getattr(getattr(trt, enum), member) if member else value)
    if order.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, order.workspace)
    if order.target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, order.target), 0)
    profile = builder.create_optimization_profile()
    names = [network.get_input(index).name for index in range(network.num_inputs)]
    if set(names) != set(order.profile):
        raise StageError(f"the graph has inputs {', '.join(names)} where its spec says {', '.join(order.profile)}")
    for name in names:
        profile.set_shape(name, *order.profile[name])
    if not profile:
        raise StageError(f"{trt.__name__} does not take these shapes: {dict(order.profile)}")
    config.add_optimization_profile(profile)
    return config


def _typed(trt: Any) -> int:
    """Creation flags of a strongly typed network: TensorRT 11 and RTX know no other, TensorRT 10 must be told."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None or int(trt.__version__.partition(".")[0]) != 10 else 1 << int(flag)


def _read_timings(config: Any, path: Path) -> None:
    """Build with the timings in `path`, or with none where they are missing, damaged or another GPU's."""
    kept = b""
    with suppress(OSError):
        kept = path.read_bytes()
    for blob in dict.fromkeys((kept, b"")):
        cache = config.create_timing_cache(blob)
        # Timings of another GPU or version are refused by the library, not silently used.
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return


def _keep_timings(config: Any, path: Path) -> None:
    """Timings only save time: what cannot be kept does not undo a finished build."""
    cache = config.get_timing_cache()
    blob = None if cache is None else cache.serialize()
    if blob is not None:
        with suppress(OSError):
            write_whole(path, bytes(memoryview(blob)))


def _inspected(trt: Any, log: Any, order: Order) -> str:
    """The layer table as the engine inspector's JSON: only where there is a GPU to load the plan on."""
    runtime = trt.Runtime(log)
    if "VERSION_COMPATIBLE" in order.flags:
        # Such a plan brings the runtime that executes it, as machine code.
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(order.plan.read_bytes())
    if engine is None:
        raise StageError(f"{trt.__name__} cannot load the engine it has just built: {log.reason()}")
    text: str = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return text


def _log(trt: Any, path: Path) -> Any:
    """A logger that writes what is told at INFO and above, and keeps the layer table, which is told as VERBOSE.

    Message by message: where the library crashes, its last words are what there is to go by.
    """
    severity = trt.ILogger.Severity
    path.write_text("", encoding="utf-8")

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.table = ""

        def log(self, level: Any, message: str) -> None:
            if message.startswith(TABLE):
                self.table = message
            elif int(level) <= int(severity.INFO):
                with path.open("a", encoding="utf-8") as file:
                    file.write(f"[{level.name}] {message}\n")
                if int(level) <= int(severity.ERROR):
                    self.errors.append(message)

        def reason(self) -> str:
            return "; ".join(dict.fromkeys(self.errors)) or "no reason given"

    return Log()


def _monitor(trt: Any, say: Say) -> Any:
    """Tells the builder's phases as progress, and stops the build after Ctrl-C.

    The fraction is that of the outermost phase. Callbacks may come from any thread; `say` is called from one at a time.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = threading.Event()
            self._lock = threading.Lock()
            self._whole: tuple[str, int] | None = None  # the outermost phase and its steps
            self._fraction = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                if parent_phase is None:
                    self._whole = (phase_name, max(1, num_steps))
                say(phase_name[:1].lower() + phase_name[1:], self._fraction)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if self._whole is not None and phase_name == self._whole[0]:
                    self._fraction = min(1.0, (step + 1) / self._whole[1])
            return not self.stopped.is_set()

        def phase_finish(self, phase_name: str) -> None:
            pass

    monitor = Monitor()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda _number, _frame: monitor.stopped.set())
    return monitor


def _writer(trt: Any, file: Any) -> Any:
    """Writes the plan as it comes, so that no second copy of it is held."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: Any) -> int:
            file.write(data)
            return len(data)

    return Writer()
