"""Triton's interpreter with less of what it does again and again.

- Its language is patched once a launch, not again for every call of a function of the kernel, which finds it as it is
  and takes longer than the call.
- A block's type is one object for each dtype and shape. What operands of these types become is found out once, and so
  is the tensor that a number becomes beside them; tensors of one shape are not broadcast, those of one type not cast.
- A sum is not computed again for a check of its size that only debugging does.
"""

from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

core = tl.core
EVERYTHING = SimpleNamespace(__globals__=dict(tl=tl, core=core))  # what any kernel's functions see of the language
SHAPES: dict[tuple[int, ...], tuple[Any, Any, Any, str]] = {}  # of a type, of a tensor, its numel, in words
DTYPES: dict[str, Any] = {}  # NumPy's, by the name of ours
KEPT: dict[int, Any] = {}  # types that live as long as this, by their id: dtypes and blocks of them
BLOCKS: dict[tuple[int, tuple[int, ...]], Any] = {}  # of them, by dtype and shape
AS_THEY_ARE: set[tuple[Any, ...]] = set()  # types of operands that an operator takes so
NUMBERS: dict[tuple[Any, ...], Any] = {}  # tensors that numbers became


def patch_once() -> None:
    """Where kernels are interpreted: a compiler's values are of one kernel, and must not be kept. Without these names,
    as another Triton may be, nothing changes."""
    if not triton.knobs.runtime.interpret:
        return
    if hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    if hasattr(interpreter, "_patch_attr"):
        interpreter._patch_attr = _patch_attr
    if all(hasattr(core, name) for name in ("_unwrap_shape", "validate_block_shape", "base_value")):
        KEPT.update({id(dtype): dtype for dtype in vars(core).values() if type(dtype) is core.dtype})
        core.block_type.__new__ = _block
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


def _patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """What it does, without a look at every argument of every call."""
    semantic = interpreter.interpreter_semantic

    def called(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return member(*args, **kwargs)

    scope.set_attr(obj, name, called)


def _shared(shape: tuple[int, ...]) -> tuple[Any, Any, Any, str]:
    if shape not in SHAPES:
        numel = core.validate_block_shape(shape) if shape else 1
        of_type = core.tuple(shape)
        of_tensor = core.tuple([core.constexpr(size) for size in shape])
        SHAPES[shape] = of_type, of_tensor, core.constexpr(numel), str(of_type)
    return SHAPES[shape]


def _sizes(shape: Any) -> tuple[int, ...]:
    assert isinstance(shape, list | tuple | core.tuple)
    sizes = tuple(shape.values if isinstance(shape, core.tuple) else shape)
    return sizes if all(type(size) is int for size in sizes) else tuple(core._unwrap_shape(shape))


def _block(cls: type, element_ty: Any, shape: Any) -> Any:
    """The one that there is, of a dtype that is kept."""
    key = id(element_ty), _sizes(shape)
    if (found := BLOCKS.get(key)) is None:
        found = object.__new__(cls)
        if key[0] in KEPT:
            BLOCKS[key] = KEPT[id(found)] = found
    return found


def _block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """What `block_type.__init__` does, once."""
    if "name" in vars(self):
        return
    if not (sizes := _sizes(shape)):
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self.shape, _, numel, words = _shared(sizes)
    self.numel = numel.value
    self.name = f"<{words}, {element_ty}>"


def _tensor(self: Any, handle: Any, type: Any) -> None:
    """What `tensor.__init__` does."""
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    _, self.shape, self.numel, _ = _shared(tuple(type.shape.values) if type.is_block() else ())


def _operands(whole: Any) -> Any:
    def binary_op_type_checking_impl(self: Any, lhs: Any, rhs: Any, *modes: bool, **named: bool) -> Any:
        left, right = isinstance(lhs, core.tensor), isinstance(rhs, core.tensor)
        types = id(lhs.type) if left else _number(lhs), id(rhs.type) if right else _number(rhs)
        key = *types, *modes, *named.items()
        if left and right:
            if key in AS_THEY_ARE:
                return lhs, rhs
        elif (found := NUMBERS.get(key)) is not None:
            return (lhs, found) if left else (found, rhs)
        one, other = whole(self, lhs, rhs, *modes, **named)
        if all(t is None or t in KEPT for t, is_tensor in zip(types, (left, right), strict=True) if is_tensor):
            if left and right and one is lhs and other is rhs:
                AS_THEY_ARE.add(key)
            elif left is not right and (one is lhs if left else other is rhs) and None not in types:
                if len(NUMBERS) > 4096:
                    NUMBERS.clear()
                NUMBERS[key] = made = other if left else one
                made.handle.data.flags.writeable = False
        return one, other

    return binary_op_type_checking_impl


def _number(value: Any) -> Any:
    """What tells it from all others: its type, and the sign of a zero. None of a NaN, which equals none."""
    known = type(value) in (bool, int, float) and value == value
    return (type(value), value or repr(value)) if known else None


def _broadcast(whole: Any) -> Any:
    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if not (left.is_block() and right.is_block()):
            return whole(self, lhs, rhs)
        if left.shape is right.shape:
            return lhs, rhs
        pairs = tuple(zip(left.shape.values, right.shape.values, strict=False))
        if len(left.shape) != len(right.shape) or any(a != b and 1 not in (a, b) for a, b in pairs):
            return whole(self, lhs, rhs)
        both = [a if b == 1 else b for a, b in pairs]
        return _spread(self, lhs, both), _spread(self, rhs, both)

    return broadcast_impl_value


def _spread(self: Any, value: Any, shape: list[int]) -> Any:
    if value.type.shape.values == shape:
        return value
    made = self.builder.create_broadcast(value.handle, shape)
    return self.make_tensor(made, core.block_type(value.dtype, shape))


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
    "binary_op_type_checking_impl": _operands,
    "broadcast_impl_value": _broadcast,
    "_cast_to_computation_type": _cast,
    "binary_op_sanitize_overflow_impl": _check,
}
