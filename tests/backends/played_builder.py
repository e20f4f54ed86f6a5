"""A TensorRT that only plays a build: as much of its module as `compiling.work` uses."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any


class Severity(IntEnum):
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class Timings:
    def __init__(self, blob: bytes):
        self.blob = blob

    def serialize(self):
        return self.blob or None


class Builder:
    """The module. Its build tells `told`, then takes `steps` and calls `during` after each, and writes a plan.

    damaged   serialized timings that are no cache
    foreign   timings of another GPU
    """

    __version__ = "11.4"
    __name__ = "played_trt"
    IProgressMonitor = IStreamWriter = type("Base", (), {"__init__": lambda self: None})
    ILogger = type("ILogger", (), {"__init__": lambda self: None, "Severity": Severity})
    ProfilingVerbosity = SimpleNamespace(DETAILED=1)
    BuilderFlag = SimpleNamespace(TF32=0, VERSION_COMPATIBLE=1, REQUIRE_USER_ALLOCATION=2)
    NetworkDefinitionCreationFlag = SimpleNamespace()
    LayerInformationFormat = SimpleNamespace(JSON=1)

    def __init__(
        self,
        *,
        steps: int = 3,
        during: Callable[[], None] = lambda: None,
        told: tuple[tuple[Severity, str], ...] = (),
        parses: bool = True,
        builds: bool = True,
        damaged: tuple[bytes, ...] = (),
        foreign: tuple[bytes, ...] = (),
        keeps: bool = True,
    ):
        self.steps, self.during, self.told, self.parses, self.builds = steps, during, told, parses, builds
        self.damaged, self.foreign, self.keeps = damaged, foreign, keeps
        self.timings: Timings | None = None
        self.measured = 0
        self.flags: set[int] = set()
        self.stopped = False
        self.runtimes: list[Any] = []

    def Builder(self, log):  # noqa: N802
        self.log = log
        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(num_inputs=0),
            create_builder_config=lambda: self.config,
            create_optimization_profile=lambda: True,
            build_serialized_network_to_stream=self.build,
        )

    @property
    def config(self):
        def attach(cache, *, ignore_mismatch):
            assert not ignore_mismatch
            assert cache is not None, "TypeError in the real one"
            if cache.blob in self.foreign:
                return False
            self.timings = cache
            return True

        made = SimpleNamespace(
            clear_flag=lambda flag: None,
            set_flag=self.flags.add,
            add_optimization_profile=lambda profile: 0,
            create_timing_cache=lambda blob: None if blob in self.damaged else Timings(blob),
            set_timing_cache=attach,
            get_timing_cache=lambda: self.timings if self.keeps else None,
        )
        self.told_config = made
        return made

    def OnnxParser(self, network, log):  # noqa: N802
        log.log(Severity.WARNING, "an operator is odd")
        return SimpleNamespace(
            parse_from_file=lambda path: self.parses, num_errors=1,
            get_error=lambda index: SimpleNamespace(desc=lambda: "no importer for Odd"),
        )  # fmt: skip

    def build(self, network, config, writer):
        for severity, message in self.told:
            self.log.log(severity, message)
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, self.steps)
        for step in range(self.steps):
            self.during()
            if not monitor.step_complete("Building engine", step):
                self.stopped = True
                return False
        monitor.phase_finish("Building engine")
        if self.timings is not None:
            self.timings.blob += b"measured;"
        writer.write(b"plan")
        return self.builds

    def Runtime(self, log):  # noqa: N802
        """One that loads a version compatible plan only when it is trusted to run code."""
        runtime = SimpleNamespace(engine_host_code_allowed=False)
        engine = SimpleNamespace(
            create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda form: '{"Layers": []}')
        )
        lean = self.BuilderFlag.VERSION_COMPATIBLE in self.flags
        runtime.deserialize_cuda_engine = lambda plan: engine if runtime.engine_host_code_allowed or not lean else None
        return runtime
