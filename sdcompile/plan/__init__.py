"""recipe + source + machine -> Plan: every step, in order, with its key.

`steps` is what a plan is, `draft` gives each step its key, `layout` decides which steps a recipe
means and refuses what cannot be built.
"""

from __future__ import annotations

from sdcompile.plan.layout import resolve
from sdcompile.plan.steps import SOURCE, Machine, Plan, Step

__all__ = ["SOURCE", "Machine", "Plan", "Step", "resolve"]
