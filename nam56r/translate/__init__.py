"""From an authored recipe to what Megatron has symbols and flags for, and what it hasn't.

`translate` gives the plan of a translation, `megatron_args` its command-line flags. Nothing is renamed to look more
native than it is: what Megatron can't say stays visible, as a seam with a note or as a refusal.
"""

from nam56r.translate.contract import (
    STACK_SPEC,
    Issue,
    Refusal,
    TranslatedSlot,
    TranslationPlan,
    TranslationRefused,
    together,
    translate,
)
from nam56r.translate.flags import DISPATCHERS, MegatronArgs, by_flag, megatron_args

__all__ = [
    "DISPATCHERS",
    "STACK_SPEC",
    "Issue",
    "MegatronArgs",
    "Refusal",
    "TranslatedSlot",
    "TranslationPlan",
    "TranslationRefused",
    "by_flag",
    "megatron_args",
    "together",
    "translate",
]
