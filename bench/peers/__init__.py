"""Who else computes what our ops compute: a registry op -> {peer -> adapter}. README.md says how to get each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from cards import Op

from . import attention, experts, head, mamba, norm, paged, router, unmask
from .base import TOLERANCE, Peer, Unavailable, compiled, difference, fresh

__all__ = ["GENERAL", "REGISTRY", "TOLERANCE", "Peer", "Unavailable", "difference", "names", "peers_of"]

GENERAL = ("eager", "compiled")  # of every op: its reference as it stands, and under torch.compile

REGISTRY: dict[str, dict[str, Peer]] = {}
for part in (norm, router, experts, attention, paged, mamba, head, unmask):
    for op, peers in part.PEERS.items():
        REGISTRY.setdefault(op, {}).update({peer.name: peer for peer in peers})


def names() -> list[str]:
    """Every peer's name, the general ones first, then as registered."""
    return list(dict.fromkeys([*GENERAL, *(name for peers in REGISTRY.values() for name in peers)]))


def peers_of(op: Op, wanted: Sequence[str] | None = None) -> list[Peer]:
    """The peers of an op, of those wanted (None: all), for one row."""
    fresh()
    eager = Peer("eager", lambda a: partial(op.reference, **vars(a)), backward=True)
    inductor = Peer("compiled", lambda a: partial(compiled(op.reference), **vars(a)), backward=True)
    found = [eager, inductor, *REGISTRY.get(op.fn.__name__, {}).values()]
    return [peer for peer in found if wanted is None or peer.name in wanted]
