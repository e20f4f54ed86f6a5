"""The other ways to run the same weights that a bundle can be measured against.

One row each: what to say of it, and the packages it needs. How a peer loads is in `worker`, which
runs under an interpreter that may hold nothing of this project.
"""

from __future__ import annotations

from dataclasses import dataclass

_TORCH = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Peer:
    """packages  distributions it needs
    what      how tables call it
    export    name of the form it exports first; such peers run in an environment of their own, as
              they need other versions than this project
    gpu       runs on an NVIDIA GPU, and needs a torch that can
    """

    packages: tuple[str, ...]
    what: str
    export: str = ""
    gpu: bool = False


PEERS: dict[str, Peer] = {
    "diffusers-fp32": Peer(_TORCH, "diffusers, torch eager, fp32"),
    "diffusers-bf16": Peer(_TORCH, "diffusers, torch eager, bf16, channels last"),
    "torch-compile": Peer(_TORCH, "diffusers, torch.compile of UNet and VAE decoder, fp32"),
    "torch-compile-bf16": Peer(_TORCH, "the same in bf16, channels last"),
    "diffusers-cuda-fp16": Peer(_TORCH, "diffusers, torch eager on the GPU, fp16, channels last", gpu=True),
    "torch-compile-cuda-fp16": Peer(
        _TORCH, "diffusers, torch.compile of UNet and VAE decoder on the GPU, fp16, channels last", gpu=True
    ),
    "optimum-intel": Peer(("optimum-intel", "openvino"), "optimum-intel, OpenVINO, dynamic shapes", "openvino"),
    "optimum-intel-static": Peer(("optimum-intel", "openvino"), "optimum-intel, OpenVINO, static shapes", "openvino"),
    "optimum-onnx": Peer(("optimum-onnx", "onnxruntime"), "optimum-onnx, ONNX Runtime", "onnx"),
}
REFERENCE = "diffusers-fp32"
