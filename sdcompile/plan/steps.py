"""What a plan is: steps with readable keys, in an order in which they can run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sdcompile.backends import Probe
from sdcompile.recipe import Recipe
from sdcompile.spec import STAGES, Job, Kind, Stage, at_target

SOURCE = "source"
"""The role of the source itself among a step's inputs."""


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of the machine it is made for."""

    versions: Mapping[str, str | None]
    probes: Mapping[str, Probe]
    identity: Mapping[str, str]


@dataclass(frozen=True)
class Step:
    """One node of the plan: an op, on one component, from folders to a folder.

    inputs   role -> name of the step whose folder plays it (SOURCE for the source itself)
    parts    everything that decides the bytes, readable; `key` is its sha256
    cannot   why this machine cannot run the step ("" = it can)
    variant  tells a second step of the same op on one component from the first: what it makes otherwise
    target   whose alone the step is, where a recipe has several targets ("" = it serves all)
    """

    component: str
    stage: Stage
    op: str
    gives: Kind
    inputs: Mapping[str, str]
    job: Job
    parts: Mapping[str, Any]
    key: str
    cannot: str = ""
    memory_bytes: int = 0
    disk_bytes: int = 0
    variant: str = ""
    target: str = ""

    @property
    def name(self) -> str:
        variant = f"-{self.variant}" if self.variant else ""
        return at_target(f"{self.component}.{self.stage}.{self.op}{variant}", self.target)

    @property
    def of(self) -> str:
        """The component, and the target whose alone the step is: unet, unet@openvino."""
        return at_target(self.component, self.target)


@dataclass(frozen=True)
class Plan:
    """The steps in an order in which they can run, and what the recipe left to be said.

    goals   names of steps whose folders are wanted, besides those that nothing else is made from
    """

    recipe: Recipe
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    goals: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __getitem__(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    def until(self, stage: Stage, only: str | None = None) -> Plan:
        """The steps that `stage` needs, of all components or of one."""
        last = STAGES.index(stage)
        wanted = [s for s in self.steps if STAGES.index(s.stage) <= last and (only is None or only == s.component)]
        return self.upstream_of(s.name for s in wanted)

    def upstream_of(self, names: Iterable[str]) -> Plan:
        """The named steps and everything they are made from."""
        by_name = {s.name: s for s in self.steps}
        needed: set[str] = set()
        todo = list(names)
        while todo:
            name = todo.pop()
            if name not in needed and name != SOURCE:
                needed.add(name)
                todo.extend(by_name[name].inputs.values())
        return replace(self, steps=tuple(s for s in self.steps if s.name in needed))
