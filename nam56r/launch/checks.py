"""Every rule that a launch is held to, all judged at once: what was asked, the rule, and what would satisfy it.

A rule of Megatron's names the file of megatron-core 0.19.2 that has it. Remedies that a profile's key can bring are
written "key = value".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from nam56r.launch import policy, sizes
from nam56r.launch.facts import Check, Facts

# in the order in which an operator reads a profile
RULES: tuple[Callable[[Facts], Iterable[Check]], ...] = (
    sizes.layout,
    sizes.processes,
    sizes.tensor_parallel,
    sizes.batch,
    policy.precision,
    policy.graphs,
    policy.environment,
    policy.entry,
    policy.translation,
    policy.fits,
    policy.here,
)


def judge(facts: Facts) -> tuple[Check, ...]:
    """Every check of every rule."""
    return tuple(check for rule in RULES for check in rule(facts))
