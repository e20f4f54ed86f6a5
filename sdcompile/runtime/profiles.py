"""Profiles: named sets of options in a bundle's profiles.json, and the rules that choose one by the machine's state.

    {"profiles": {"draft": {"num_inference_steps": 8}, "balanced": {}, "quality": {"num_inference_steps": 30}},
     "policy": [{"battery_below": 0.2, "profile": "draft"}, {"thermal": "throttling", "profile": "draft"}]}

The file is for people to edit: its hash is not in the manifest. Options it sets win over the bundle's
defaults, those of a call over it. The first rule that holds chooses; where none does, no profile is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdcompile.errors import BundleError, RecipeError
from sdcompile.runtime.offer import Offer
from sdcompile.runtime.options import Options

FILE = "profiles.json"

PowerState = Callable[[], Mapping[str, Any]]
"""Tells of the machine: battery (0 to 1) and thermal (a word such as "throttling"), each only where known."""

_CONDITIONS = {"battery_below", "battery_above", "thermal"}


@dataclass(frozen=True)
class Profiles:
    """A bundle's profiles, and its rules in the order in which they are tried."""

    options: Mapping[str, Options] = field(default_factory=dict)
    policy: tuple[Mapping[str, Any], ...] = ()

    def named(self, name: str) -> Options:
        """The options of a profile. Raises RecipeError for a name that is none."""
        if name not in self.options:
            raise RecipeError(f"profile {name!r} is not in this bundle", f"it has: {', '.join(self.options) or 'none'}")
        return self.options[name]

    def chosen(self, state: Mapping[str, Any]) -> str | None:
        """The profile of the first rule that holds in `state`."""
        return next((rule["profile"] for rule in self.policy if _holds(rule, state)), None)


def read(folder: Path, offer: Offer | None = None) -> Profiles:
    """The profiles of the bundle at `folder`; none where it has no file.

    Raises BundleError for a file that is wrong, or asks for more than the bundle's `offer`.
    """
    path = folder / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        options = {name: Options.of(values, f"profile {name}: ") for name, values in data["profiles"].items()}
        rules = tuple(dict(rule) for rule in data.get("policy", []))
    except FileNotFoundError:
        return Profiles()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"{path} cannot be read: {error}", '{"profiles": {"draft": {...}}, "policy": [...]}'
        ) from error
    except RecipeError as error:
        raise BundleError(f"{path}: {error.message}", error.hint) from error
    for rule in rules:
        unknown = set(rule) - _CONDITIONS - {"profile"}
        if unknown or rule.get("profile") not in options or len(rule) < 2:
            raise BundleError(
                f"{path}: {json.dumps(rule)} is no rule",
                f"a profile of this file ({', '.join(options) or 'it has none'}), and conditions: "
                f"{', '.join(sorted(_CONDITIONS))}",
            )
    for name, asked in options.items():
        try:
            faults = [] if offer is None else [f"{option}: {text}" for option, text in offer.faults(asked)]
        except RecipeError as error:
            raise BundleError(f"{path}: profile {name}: {error.message}", error.hint) from error
        if faults:
            raise BundleError(
                f"{path}: profile {name}: {'; '.join(faults)}", "edit the file, or build what it asks for"
            )
    return Profiles(options, rules)


def power_state(root: Path = Path("/sys/class/power_supply")) -> dict[str, Any]:
    """The emptiest battery that Linux tells of, as a `PowerState`; nothing known where there is none."""
    levels = []
    for path in sorted(root.glob("*/capacity")):
        try:
            levels.append(int(path.read_text(encoding="ascii")) / 100)
        except (OSError, ValueError):
            continue  # a battery that is there and does not answer
    return {"battery": min(levels)} if levels else {}


def _holds(rule: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    battery = state.get("battery")
    if "battery_below" in rule and not (battery is not None and battery < rule["battery_below"]):
        return False
    if "battery_above" in rule and not (battery is not None and battery > rule["battery_above"]):
        return False
    return "thermal" not in rule or state.get("thermal") == rule["thermal"]
