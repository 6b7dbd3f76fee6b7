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


def _together(pool: Tensor, indices: Tensor | None, rows: int) -> slice | None:
    """Which slots all rows read or write, where those lie side by side: without indices, and for a single row."""
    if indices is None:
        return slice(0, rows)
    if rows != 1 or not can_look(indices):
        return None
    slot = min(max(int(indices), 0), pool.shape[0] - 1)
    return slice(slot, slot + 1)


def read_slots(pool: Tensor, indices: Tensor | None, rows: int, *, own: bool = False) -> Tensor:
    """What each row reads; `own`: in memory that a write to the slots does not change."""
    lies = _together(pool, indices, rows)
    if indices is None or lies is not None:
        state = pool if pool.shape[0] == rows else pool[lies]
        return state.clone() if own else state
    return pool.index_select(0, indices.clamp(0, pool.shape[0] - 1))


@without_gradients
def write_slots(pool: Tensor, new: Tensor, indices: Tensor | None) -> None:
    lies = _together(pool, indices, new.shape[0])
    if indices is None or lies is not None:
        (pool if pool.shape[0] == new.shape[0] else pool[lies]).copy_(new)
    else:
        pool.index_copy_(0, indices.long().clamp(0, pool.shape[0] - 1), new.to(pool.dtype))
