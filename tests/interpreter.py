"""Triton's interpreter with less of what it does again and again.

- Its language is patched once a launch, not again for every call of a function of the kernel, which finds it as it is
  and takes longer than the call.
- Types of tensors share what depends on their shape alone. Tensors of one shape are not broadcast, those of one type
  not cast, and a sum is not computed again for a check of its size that only debugging does.
"""

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

core = tl.core
EVERYTHING = SimpleNamespace(__globals__=dict(tl=tl, core=core))  # what any kernel's functions see of the language
SHAPES: dict[tuple[int, ...], tuple[Any, Any, Any, str]] = {}  # of a type, of a tensor, numel, in words
DTYPES: dict[str, Any] = {}  # NumPy's, by the name of ours


def patch_once() -> None:
    """Without these names, as another Triton may be, nothing changes."""
    if hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    if all(hasattr(core, name) for name in ("_unwrap_shape", "validate_block_shape", "base_value")):
        core.block_type.__init__ = _block_type
        core.tensor.__init__ = _tensor
        for name, short in SHORT.items():
            if hasattr(TritonSemantic, name):
                setattr(TritonSemantic, name, short(getattr(TritonSemantic, name)))


def _once_a_launch(patch: Any) -> Any:
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

    return patch_lang


def _remembered(get: Any) -> Any:
    def get_np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in DTYPES:
            DTYPES[name] = get(dtype)
        return DTYPES[name]

    return get_np_dtype


def _shared(shape: tuple[int, ...]) -> tuple[Any, Any, Any, str]:
    if shape not in SHAPES:
        numel = core.validate_block_shape(shape) if shape else 1
        of_type = core.tuple(shape)
        of_tensor = core.tuple([core.constexpr(size) for size in shape])
        SHAPES[shape] = of_type, of_tensor, numel, str(of_type)
    return SHAPES[shape]


def _block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """What `block_type.__init__` does."""
    assert isinstance(shape, list | core.tuple)
    self.element_ty = element_ty
    sizes = tuple(shape.values if isinstance(shape, core.tuple) else shape)
    if not all(type(size) is int for size in sizes):
        sizes = tuple(core._unwrap_shape(shape))
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.shape, _, self.numel, words = _shared(sizes)
    self.name = f"<{words}, {element_ty}>"


def _tensor(self: Any, handle: Any, type: Any) -> None:
    """What `tensor.__init__` does."""
    core.base_value.__init__(self)
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    _, self.shape, numel, _ = _shared(tuple(type.shape.values) if type.is_block() else ())
    self.numel = core.constexpr(numel)


def _broadcast(whole: Any) -> Any:
    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and left.shape is right.shape:
            return lhs, rhs
        return whole(self, lhs, rhs)

    return broadcast_impl_value


def _cast(whole: Any) -> Any:
    def cast_to_computation_type(self: Any, value: Any, dtype: Any) -> Any:
        if isinstance(value, core.tensor) and value.dtype is dtype:
            return value
        return whole(self, value, dtype)

    return cast_to_computation_type


def _check(whole: Any) -> Any:
    def binary_op_sanitize_overflow_impl(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        if self.builder.options.debug:
            whole(self, lhs, rhs, binary_op)

    return binary_op_sanitize_overflow_impl


SHORT = {  # methods of TritonSemantic, and what does the same in less
    "broadcast_impl_value": _broadcast,
    "_cast_to_computation_type": _cast,
    "binary_op_sanitize_overflow_impl": _check,
}
