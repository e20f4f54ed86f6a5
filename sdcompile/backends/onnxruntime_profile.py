"""What ONNX Runtime's profile of a session says of each node. It opens no engine itself."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime as ort


def least(
    graph: Path, open_to: Callable[[Path], ort.InferenceSession], feeds: Mapping[str, np.ndarray], calls: int
) -> list[tuple[str, float]]:
    """(name, least seconds over `calls`) of every node of the engine made of `graph`, in the order they run.

    `open_to` opens a session whose profile goes to a file that begins like its argument. What comes before the first
    call is no part of it, and neither is that call, in which memory is found.
    """
    import onnx

    # A convolution in blocks of channels is named after the value it makes.
    nodes = onnx.load(graph, load_external_data=False).graph.node
    makers = {f"{value}_nchwc": node.name for node in nodes for value in node.output}
    with tempfile.TemporaryDirectory(prefix="sdcompile-profile-") as scratch:
        session = open_to(Path(scratch) / "profile")
        for _ in range(calls + 1):
            session.run(None, dict(feeds))
        rows = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = [(row["name"].removesuffix("_kernel_time"), 1e-6 * row["dur"]) for row in rows if row.get("cat") == "Node"]
    each = len(ran) // (calls + 1)
    turns = [ran[each * turn : each * (turn + 1)] for turn in range(1, calls + 1)]
    told = [(same[0][0], min(seconds for _, seconds in same)) for same in zip(*turns, strict=True)]
    return [(makers.get(name, name), seconds) for name, seconds in told]
