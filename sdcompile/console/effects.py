"""What passes did, as a table. Imports rich."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.text import Text

from sdcompile.console.grid import Facts, grid
from sdcompile.console.terminal import size


def effects(components: Mapping[str, Facts]) -> Iterator[Any]:
    """What each pass did to each component, and whether int8 and pruning won."""
    passes = [effect for row in components.values() for effect in row["passes"]]
    # Only where a build told passes apart (`verify: {each_pass: true}`).
    more = {"call": time_of_call, "alignment": alignment}
    more = {name: tell for name, tell in more.items() if any(map(tell, passes))}
    table = grid(
        "component", "pass", "parameters", "size", "SNR early / mid / late", *more, "", right=("parameters", "size")
    )
    for name, row in components.items():
        for effect in row["passes"]:
            (before, after), (old, new) = effect["parameters"], effect["bytes"]
            of = f" of {before / 1e6:.2f}" if after != before else ""
            table.add_row(
                Text(name), effect["pass"], f"{after / 1e6:.2f} M{of}",
                f"{size(new)} of {size(old)}", " / ".join(f"{level:.1f}" for level in effect["snr_db"].values()),
                *(tell(effect) for tell in more.values()),
                Text(_quantized(effect) or _kept(effect) or _widths(effect) + _work(effect)),
            )  # fmt: skip
    yield table
    for name, row in components.items():
        for race in row["races"]:
            yield f"{name}: {won(race)}"


def time_of_call(effect: Facts) -> str:
    """Before and after a pass, by processor time, which other work on the machine disturbs least; "" = not measured."""
    before, after = effect.get("cpu_ms", (0, 0))
    return f"{after / before:.2f} of {before:.{0 if before >= 100 else 2}f} ms" if before else ""


def alignment(effect: Facts) -> str:
    """The tiny model's, after a pass, and by how much that is another than before it; "" = not measured."""
    told = effect.get("alignment")
    return f"{told['after']:.3f} ({told['change']:+.3f} ± {told['error']:.3f})" if told else ""


def won(race: Facts) -> str:
    """What a race measured of an engine that was kept, and what was asked of it."""
    wanted = f"accept_if wants {race['wanted']:g}" if race["wanted"] else "kept whatever it is"
    return f"{race['name']} is {race['speedup']:.2f} times as fast as {race['rival']} by processor time ({wanted})"


def _work(effect: Facts) -> str:
    before, after = effect.get("macs") or (0, 0)
    return f"{after / before:.2f} of the multiply-accumulates" if after != before else ""


def _widths(effect: Facts) -> str:
    """Of a narrowed UNet: the channels of each level."""
    before, after = effect.get("widths", {}).get("block_out_channels", ([], []))
    names = ", ".join(map(str, after)), ", ".join(map(str, before))
    return f"{names[0]} channels of {names[1]}; " if after != before else ""


def _quantized(effect: Facts) -> str:
    if "quantized" not in effect:
        return ""
    out = effect["left_out"]
    names = ", ".join(out[:3]) + (f" and {len(out) - 3} more" if len(out) > 3 else "")
    narrow = f", {effect['bits4']} of them in 4 bits" if effect.get("bits4") else ""
    return f"{effect['quantized']} of {effect['operators']} in int8{narrow}" + (
        f"; for the budget in float: {names}" if out else ""
    )


def _kept(effect: Facts) -> str:
    """Of a cast: how many nodes stay in float32, and why the first ones do."""
    if not effect.get("kept_count"):
        return ""
    rows = effect["kept"][:2]
    names = "; ".join(f"{row['node']} ({row['why']})" for row in rows)
    more = effect["kept_count"] - len(rows)
    return f"{effect['kept_count']} of {effect['operators']} in float32: {names}" + (f"; {more} more" if more else "")
