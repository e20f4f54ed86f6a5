"""Compile sdcompile/backends/trt/kernels.cu to the PTX that is shipped beside it. Needs NVRTC, no GPU: `make kernels`.

The PTX is made for the oldest GPUs the NVIDIA engines know (Turing) by an old compiler, so that every driver that
runs those engines takes it. Its first lines name the compiler and the source it was made from.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

ROOM = Path(__file__).resolve().parent.parent / "sdcompile" / "backends" / "trt"
SOURCE, PTX = ROOM / "kernels.cu", ROOM / "kernels.ptx"
OPTIONS = ("--gpu-architecture=compute_75",)


def call(name: str, *arguments: Any) -> Any:
    from cuda.bindings import nvrtc

    code, *results = getattr(nvrtc, name)(*arguments)
    if int(code) != 0:
        raise SystemExit(f"{name} failed: {code.name}")
    return results[0] if len(results) == 1 else results


def version() -> str | None:
    """NVRTC's version; None where it is not installed."""
    try:
        return ".".join(map(str, call("nvrtcVersion")))
    except (ImportError, RuntimeError):
        return None


def compiled() -> str:
    """The PTX of SOURCE with its two lines of origin."""
    source = SOURCE.read_bytes()
    program = call("nvrtcCreateProgram", source, b"kernels.cu", 0, [], [])
    call("nvrtcCompileProgram", program, len(OPTIONS), [option.encode() for option in OPTIONS])
    text = bytearray(call("nvrtcGetPTXSize", program))
    call("nvrtcGetPTX", program, text)
    origin = f"// kernels.cu, sha256 {hashlib.sha256(source).hexdigest()}\n// NVRTC {version()} {' '.join(OPTIONS)}\n"
    return origin + text.rstrip(b"\0").decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the PTX that is there, write nothing")
    made = compiled()
    if parser.parse_args().check:
        return int(made != PTX.read_text(encoding="utf-8"))
    PTX.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
