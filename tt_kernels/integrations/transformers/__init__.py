"""Our kernels in transformers' models: experts, attention, Mamba-2 and norms. Tested with transformers 5.20 to 5.24.

    from tt_kernels.integrations import transformers as tt

    tt.register()  # attn_implementation="tt_kernels", experts_implementation="tt_kernels"
    changes = tt.apply(model)  # or all that is served, in a model that is there; changes.undo(), or tt.revert(model)
    changes = tt.apply_tt_kernels_to_nemotron_h()  # or in all models of a type, those to come too

transformers is imported when one of them is called. What is served, and what is refused: docs/integrations.md.
"""

from typing import Any

from .apply import NAME, TYPES, apply, apply_to, register, revert
from .changes import Changes

_PREFIX = "apply_tt_kernels_to_"

__all__ = ["NAME", "TYPES", "Changes", "apply", "apply_to", "register", "revert"]


def __getattr__(name: str) -> Any:
    if not name.startswith(_PREFIX) or name.removeprefix(_PREFIX) not in TYPES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; model types are {', '.join(TYPES)}")
    return apply_to(name.removeprefix(_PREFIX))


def __dir__() -> list[str]:
    return [*__all__, *(_PREFIX + model_type for model_type in TYPES)]
