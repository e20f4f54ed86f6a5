"""Does this machine run an engine of TensorRT or TensorRT-RTX, and which of those built: cards and drivers are
compared, nothing is loaded.
"""

from __future__ import annotations

from typing import get_args

from sdcompile.backends.base import Card, Probe, rebuilding
from sdcompile.backends.trt import targets
from sdcompile.errors import HostError
from sdcompile.families import FAMILIES


def fits(card: Card, found: Probe) -> str:
    """The target of `card`'s engines that runs on this machine.

    Raises HostError that names what was built, for what, what is here, and how to build for it.
    """
    built, bound = tuple(card.measured["engines"]), _bound_to(card)
    made_for = f"{bound} ({', '.join(built)})" if bound else ", ".join(built)
    name = f"{card.component} ({card.backend}) was built"
    if not found.available:
        raise HostError(
            f"{name} for {made_for} and cannot run here: {found.reason}",
            f"{found.hint or 'install its library'}; or rebuild it for this machine: {_elsewhere(card, 'openvino')}",
        )
    if found.cannot_run:
        raise HostError(
            f"{name} for {made_for} and cannot run here: {found.cannot_run}",
            f"run it on a machine with such a GPU, or rebuild it for this one: {_elsewhere(card, 'openvino')}",
        )
    if fault := _version_fault(card, found.version or ""):
        raise HostError(f"{name} {fault}", "rebuild it: sdcompile build RECIPE")
    device, gpu = found.identity["architecture"], found.identity["gpu"]
    chosen = targets.choose(built, device)
    if chosen is None or (bound and bound != gpu):
        raise HostError(
            f"{name} for {made_for}; the GPU here is {gpu} ({device})",
            f"rebuild it for this GPU: {rebuild(card, device)}",
        )
    return chosen


def rebuild(card: Card, device: str) -> str:
    """The command that builds for a GPU of architecture `device`: where RTX does not, with TensorRT on that GPU."""
    if card.backend == "tensorrt":
        return "sdcompile build RECIPE  (on that machine)"
    if device in get_args(targets.Target):
        return f"sdcompile build RECIPE --set 'build.compute_capabilities=[{device}]'"
    return f"{_elsewhere(card, 'tensorrt')}  (on that machine)"


def numbers(version: str) -> tuple[int, ...]:
    """ "11.4.0.106" -> (11, 4, 0, 106)."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _bound_to(card: Card) -> str:
    """The one model of GPU that an engine runs on; "" = any of its architecture.

    "Using an engine plan file across different models of devices is not supported and is likely to affect
    performance or even cause errors or deadlock" (TensorRT's log), unless it was built to be compatible.
    """
    compatible = card.options.get("hardware_compatibility", "none") != "none"
    return "" if compatible else str(card.measured.get("built_on", {}).get("gpu", ""))


def _version_fault(card: Card, here: str) -> str:
    built = str(card.measured["version"])
    if here == built:
        return ""
    told = f"with version {built} of its library; {here} is installed, and"
    if not card.options.get("version_compatible"):
        return f"{told} engines run on the version they were built with"
    return "" if numbers(here) > numbers(built) else f"{told} this one runs on that version and later ones"


def _elsewhere(card: Card, backend: str) -> str:
    family = FAMILIES.get(str(card.params.get("family")))
    return rebuilding(family.plain(card.component) if family else card.component, backend)
