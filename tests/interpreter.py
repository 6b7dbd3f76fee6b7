"""Triton's interpreter in half the time: its language is patched once a launch, not again for every call of a function
of the kernel, which finds it as it is and takes longer than the call."""

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

EVERYTHING = SimpleNamespace(__globals__=dict(tl=tl, core=tl.core))  # what any kernel's functions see of the language


def patch_once() -> None:
    """Without these names, as another Triton may be, nothing changes."""
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:
        return
    launched: list[Any] = []

    def patch_lang(fn: Any) -> Any:
        if launched:
            return SimpleNamespace(restore=lambda: None)
        scope = patch(EVERYTHING)
        restore = scope.restore

        def restored() -> None:
            launched.clear()
            restore()

        scope.restore = restored
        launched.append(scope)
        return scope

    interpreter._patch_lang = patch_lang
