"""What `apply` has changed, and how it is undone."""

from collections.abc import Callable
from typing import Any

_ABSENT: Any = object()
# What stands on classes and modules serves every model of a type: (how many hold it, what stood there before).
_held: dict[tuple[Any, str], tuple[int, Any]] = {}


def _set_back(owner: Any, name: str, old: Any) -> None:
    if old is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, old)


class Changes:
    """What runs as ours now, and what was left as it was.

    replaced: [name]
    left:     {name: reason}
    undo():   sets everything back. What several models of one type share goes with the last of them.
    """

    def __init__(self) -> None:
        self.replaced: list[str] = []
        self.left: dict[str, str] = {}
        self._undo: list[Callable[[], object]] = []

    def __str__(self) -> str:
        kept = [f"left      {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join([*(f"replaced  {name}" for name in self.replaced), *kept])

    def swap(self, owner: Any, name: str, new: Any) -> None:
        """owner.name = new, of one model."""
        old = vars(owner).get(name, _ABSENT)
        setattr(owner, name, new)
        self._undo.append(lambda: _set_back(owner, name, old))

    def share(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """owner.name = make(owner.name) of a class or module, once for all that ask."""
        count, old = _held.get((owner, name), (0, vars(owner).get(name, _ABSENT)))
        if not count:
            setattr(owner, name, make(getattr(owner, name)))
        _held[owner, name] = count + 1, old
        self._undo.append(lambda: self._release(owner, name))

    @staticmethod
    def _release(owner: Any, name: str) -> None:
        count, old = _held.pop((owner, name))
        if count > 1:
            _held[owner, name] = count - 1, old
        else:
            _set_back(owner, name, old)

    def call_back(self, undo: Callable[[], object]) -> None:
        self._undo.append(undo)

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.replaced, self.left = [], {}
