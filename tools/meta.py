"""PyTorch's meta tensors without Python: an elementwise operation in 2 us, where the registered one takes 300.

On import PyTorch lays shape functions in Python over those that its operators have in C++. This takes them off wherever
C++ has one; shapes are the same, but sizes can be no symbols then. It changes the whole process, and reads what PyTorch
keeps to itself: for the processes of tools/aot.py. Where a PyTorch keeps it elsewhere, nothing changes.
"""

from __future__ import annotations

from functools import cache

import torch

# A kernel of any of these gives shapes. One of CompositeExplicitAutograd does where it makes a tensor of none, or of a
# number for an overload that takes tensors; others are written with parts that need not know meta tensors.
KEYS = ("Meta", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")
EXPLICIT = "CompositeExplicitAutograd"


def _is_native(op: torch._ops.OpOverload) -> bool:
    simple = op._overloadname == "Scalar" or not any("Tensor" in str(a.type) for a in op._schema.arguments)
    keys = (*KEYS, EXPLICIT) if simple else KEYS
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key) for key in keys)


@cache
def without_python() -> torch.library.Library | None:
    """The library of what has no C++ form; it must be kept, which the cache does."""
    try:
        from torch import _meta_registrations as python

        over, tables = python._meta_lib_dont_use_me_use_register_meta, python.global_decomposition_table
        shapes = tables["pre_autograd"] | tables["post_autograd"] | tables["meta"]  # the last one wins
    except (ImportError, AttributeError, KeyError):
        return None
    over._destroy()
    left = torch.library.Library("aten", "IMPL", "Meta")
    for op, shape in shapes.items():
        if isinstance(op, torch._ops.OpOverload) and op.namespace == "aten" and not (op.is_view or _is_native(op)):
            left.impl(op, shape)
    return left
