"""States in slots of a buffer: `indices` name the slot that each row reads or writes; None: row b has slot b."""

from torch import Tensor

from .common import can_look, without_gradients


def check_slots(op: str, pool: Tensor | None, **indices: Tensor | None) -> None:
    """Refuse indices that are no slots, where one can look; kernels cut them to 0 and the last slot."""
    for name, slots in indices.items():
        if pool is None or slots is None or not can_look(slots):
            continue
        for slot in slots.tolist():
            if not 0 <= slot < pool.shape[0]:
                raise ValueError(f"{op}: {name} is {slot}, expected 0 to {pool.shape[0] - 1}")


def _together(pool: Tensor, indices: Tensor, rows: int) -> slice | None:
    """Which slots all rows read or write, where those lie side by side, or every n-th: for a single row, and for rows
    in the order of their slots."""
    if not can_look(indices) or rows == 0:
        return None
    slots = indices.tolist()
    first, apart = slots[0], slots[1] - slots[0] if rows > 1 else 1
    last = first + (rows - 1) * apart
    if first < 0 or apart < 1 or last >= pool.shape[0] or (rows > 2 and slots != list(range(first, last + 1, apart))):
        return None
    return slice(first, last + 1, apart)


def _view(pool: Tensor, indices: Tensor | None, rows: int) -> Tensor | None:
    """The slots themselves, where they lie so."""
    if indices is None:
        return pool if pool.shape[0] == rows else pool[:rows]
    lies = _together(pool, indices, rows)
    if lies is None:
        return None
    return pool if pool.shape[0] == rows else pool[lies]


def read_slots(pool: Tensor, indices: Tensor | None, rows: int, *, own: bool = False) -> Tensor:
    """What each row reads; `own`: in memory that a write to the slots does not change."""
    state = _view(pool, indices, rows)
    if state is None:
        assert indices is not None
        return pool.index_select(0, indices.clamp(0, pool.shape[0] - 1))
    return state.clone() if own else state


def same_slots(pool: Tensor, indices: Tensor | None, state: Tensor) -> Tensor | None:
    """The slots to write, where they are the memory of `state`, which was read and is dense: what follows it may be
    computed there, in any shape."""
    if not can_look(pool) or not state.is_contiguous():
        return None
    target = _view(pool, indices, state.shape[0])
    same = target is not None and (target.data_ptr(), target.stride()) == (state.data_ptr(), state.stride())
    return target if same else None


@without_gradients
def write_slots(pool: Tensor, new: Tensor, indices: Tensor | None) -> None:
    target = _view(pool, indices, new.shape[0])
    if target is None:
        assert indices is not None
        pool.index_copy_(0, indices.long().clamp(0, pool.shape[0] - 1), new.to(pool.dtype))
    else:
        target.copy_(new)
