"""What `apply` has changed, and how it is undone."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any


class _Absent:
    """Stands for an attribute that was not there; a class, which stays itself in a copy."""


# What stands on classes and modules serves every model of a type: (how many hold it, what stood there before).
_held: dict[tuple[Any, str], tuple[int, Any]] = {}


def _set_back(owner: Any, name: str, old: Any) -> None:
    if old is _Absent:
        delattr(owner, name)
    else:
        setattr(owner, name, old)


def _release(owner: Any, name: str) -> None:
    count, old = _held.pop((owner, name))
    if count > 1:
        _held[owner, name] = count - 1, old
    else:
        _set_back(owner, name, old)


class Changes:
    """What runs as ours now, and what was left as it was.

    replaced: [name]
    left:     {name: reason}
    undo():   sets everything back. What several models of one type share goes with the last of them.

    A copy of a model (`copy.deepcopy`) has a copy of this, which is about the copy.
    """

    def __init__(self) -> None:
        self.replaced: list[str] = []
        self.left: dict[str, str] = {}
        self._undo: list[Callable[[], object]] = []  # partials, whose arguments a copy has as copies
        self._shared: list[tuple[Any, str]] = []

    def __str__(self) -> str:
        kept = [f"left      {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join([*(f"replaced  {name}" for name in self.replaced), *kept])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Changes":
        new = memo[id(self)] = Changes()
        new.replaced, new.left = list(self.replaced), dict(self.left)
        new._undo = copy.deepcopy(self._undo, memo)
        for owner, name in self._shared:
            new._hold(owner, name)
        return new

    def swap(self, owner: Any, name: str, new: Any) -> None:
        """owner.name = new, of one model."""
        old = vars(owner).get(name, _Absent)
        setattr(owner, name, new)
        self._undo.append(partial(_set_back, owner, name, old))

    def share(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """owner.name = make(owner.name) of a class or module, once for all that ask."""
        if (owner, name) not in _held:
            old = vars(owner).get(name, _Absent)
            setattr(owner, name, make(getattr(owner, name)))
            _held[owner, name] = 0, old
        self._hold(owner, name)

    def _hold(self, owner: Any, name: str) -> None:
        count, old = _held[owner, name]
        _held[owner, name] = count + 1, old
        self._shared.append((owner, name))

    def call_back(self, undo: Callable[..., object], *args: Any) -> None:
        """Call undo(*args) to set something back; a method of a model, so that a copy calls its own."""
        self._undo.append(partial(undo, *args))

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()
        while self._shared:
            _release(*self._shared.pop())
        self.replaced, self.left = [], {}
