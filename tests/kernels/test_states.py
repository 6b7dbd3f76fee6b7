"""States in slots of a buffer: which are read, which are written, and that nothing else changes.

On references, on interpreted kernels, on a GPU; `make sanitize` looks for programs that read what others write.
"""

from typing import Any

import pytest
import torch
from parity import DEVICE, KERNELS, OPS, leaves, make, outputs, with_leaves
from torch import Tensor

pytestmark = [pytest.mark.kernels, pytest.mark.sanitize]
SCAN = dict(H=2, P=4, G=1, N=8)
# Blocks that take one launch, several, and more than one span of chunks.
CASES = [
    ("conv_advance", dict(B=3, L=5, C=6, K=4, ragged=0)),
    ("conv_advance", dict(B=3, L=2, C=6, K=4)),
    ("causal_conv1d", dict(B=3, L=2, C=6, K=4)),
    ("ssd_step", dict(b=3, **SCAN)),
    ("ssd_block", dict(b=3, L=5, **SCAN)),
    ("ssd_block", dict(b=3, L=70, **SCAN)),
    ("ssd_advance", dict(b=3, L=5, **SCAN)),
    ("ssd_chunk", dict(b=3, L=9, Q=4, **SCAN)),
    ("ssd_chunk", dict(b=2, L=90, Q=0, **SCAN)),
    ("mamba_block", dict(b=3, L=5, K=4, **SCAN)),
    ("mamba_block", dict(b=3, L=35, K=4, **SCAN)),
    ("mamba_advance", dict(b=3, L=5, K=4, **SCAN)),
    ("mamba_advance", dict(b=3, L=35, K=4, ragged=0, **SCAN)),
    ("mamba_step", dict(b=3, K=4, **SCAN)),
    ("mamba_extend", dict(b=3, L=5, K=4, **SCAN)),
    ("mamba_extend", dict(b=3, L=35, K=4, ragged=0, **SCAN)),
    ("mamba_extend", dict(b=2, L=70, K=4, **SCAN)),
]
WRITING = [case for case in CASES if OPS[case[0]].writes]
POOLS = ("conv_state", "ssm_state", "state.conv", "state.ssm")
READ = {"state.conv": "state.conv_indices", "state.ssm": "state.ssm_indices"}
OUT = {"state.conv": "state.conv_out_indices", "state.ssm": "state.ssm_out_indices"}
SLOTS = 8


def ids(cases: list[Any]) -> list[str]:
    return [f"{name}-{'-'.join(map(str, dims.values()))}" for name, dims in cases]


every = pytest.mark.parametrize("name,dims", CASES, ids=ids(CASES))
writing = pytest.mark.parametrize("name,dims", WRITING, ids=ids(WRITING))


def call(
    name: str, kwargs: dict[str, Any], read: list[int] | None, out: list[int] | None, spare: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Results, and the buffers of SLOTS states before and after; row b's own state lies in slot read[b]. Rows that
    share a slot have the last one's."""
    kwargs = with_leaves(kwargs, {})
    before = {}
    for pool in (p for p in POOLS if p in leaves(kwargs)):
        state = leaves(kwargs)[pool]
        before[pool] = torch.randn(SLOTS if spare else len(state), *state.shape[1:]).to(state)
        where = list(range(len(state))) if read is None else read
        for b, slot in enumerate(where):
            before[pool][slot] = state[b]
        places = {READ.get(pool, "state_indices"): read}
        if name not in ("causal_conv1d", "ssd_block", "mamba_block"):
            places[OUT.get(pool, "out_indices")] = out
        indices = {
            k: None if v is None else torch.tensor(v, dtype=torch.int32, device=DEVICE) for k, v in places.items()
        }
        kwargs = with_leaves(kwargs, {pool: before[pool].clone(), **indices})
    result = outputs(OPS[name], OPS[name].fn(**kwargs))
    return result, before, {pool: leaves(kwargs)[pool] for pool in before}


def rows(name: str, dims: dict[str, int]) -> tuple[dict[str, Any], list[int]]:
    """A case's arguments, and its rows."""
    return make(OPS[name], dims, torch.float32), list(range(dims.get("b", dims.get("B", 0))))


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert all(torch.equal(got[key], want[key]) for key in want)


@every
def test_it_does_not_matter_where_states_lie(name: str, dims: dict[str, int]) -> None:
    """Permuted slots give bit for bit the results of slot b for row b; other slots stay as they are."""
    kwargs, own = rows(name, dims)
    want, _, plain = call(name, kwargs, None, None, spare=False)
    where, out = [6, 0, 3][: len(own)], [1, 7, 4][: len(own)]
    for to in (None, out):
        got, before, after = call(name, kwargs, where, to)
        same(got, want)
        for pool, states in after.items():
            written = (to or where) if pool in OPS[name].writes else []
            for b, slot in enumerate(written):
                assert torch.equal(states[slot], plain[pool][b])
            others = [slot for slot in range(SLOTS) if slot not in written]
            assert torch.equal(states[others], before[pool][others])


@every
def test_a_buffer_may_have_more_slots_than_rows(name: str, dims: dict[str, int]) -> None:
    kwargs, own = rows(name, dims)
    want, _, plain = call(name, kwargs, None, None, spare=False)
    got, before, after = call(name, kwargs, None, None)
    same(got, want)
    for pool, states in after.items():
        assert torch.equal(states[own], plain[pool]) and torch.equal(states[len(own) :], before[pool][len(own) :])


@writing
def test_a_fork(name: str, dims: dict[str, int]) -> None:
    """Rows read one slot and write to others: each goes on from there by itself, and the slot stays as it is."""
    kwargs, own = rows(name, dims)
    got, before, after = call(name, kwargs, [2] * len(own), [5, 0, 4][: len(own)])
    shared = {pool: state[2].expand(len(own), *state.shape[1:]).clone() for pool, state in before.items()}
    want, _, plain = call(name, with_leaves(kwargs, shared), None, None, spare=False)
    same(got, want)
    for pool, states in after.items():
        assert torch.equal(states[[5, 0, 4][: len(own)]], plain[pool]) and torch.equal(states[2], before[pool][2])


@writing
def test_nothing_that_enters_copies_the_state(name: str, dims: dict[str, int]) -> None:
    if name.endswith("step"):
        pytest.skip("a step takes one token")
    kwargs, own = rows(name, dims)
    kwargs["counts"] = torch.zeros(len(own), dtype=torch.int32, device=DEVICE)
    where, out = [6, 0, 3][: len(own)], [1, 7, 4][: len(own)]
    _, before, after = call(name, kwargs, where, out)
    for pool, states in after.items():
        assert torch.equal(states[out], before[pool][where])


@pytest.mark.parametrize("name,dims", [c for c in WRITING if c[0].startswith("ssd")])
def test_an_ssm_state_may_be_written_where_it_is_read(name: str, dims: dict[str, int]) -> None:
    """Whether or not it is said twice."""
    kwargs, own = rows(name, dims)
    where = [6, 0, 3][: len(own)]
    (want, _, plain), (got, _, after) = (call(name, kwargs, where, out) for out in (None, where))
    same(got, want)
    assert torch.equal(after["ssm_state"][where], plain["ssm_state"][where])


@pytest.mark.skipif(not KERNELS, reason="a reference refuses them")
@every
def test_indices_are_cut_to_the_slots(name: str, dims: dict[str, int]) -> None:
    """A kernel cannot refuse what it would have to wait for: it stays in the buffer."""
    kwargs, _ = rows(name, dims | {k: 1 for k in ("b", "B") if k in dims})
    for wild, cut in ((-2, 0), (2**31 - 1, SLOTS - 1)):
        found = []
        for slot in (wild, cut):
            torch.manual_seed(0)
            found.append(call_at(name, kwargs, slot))
        (got, after), (want, plain) = found
        same(got, want)
        same(after, plain)


def call_at(name: str, kwargs: dict[str, Any], slot: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One row that reads slot `slot` and, where it writes, writes slot 3."""
    places = {}
    for pool in (p for p in POOLS if p in leaves(kwargs)):
        state = leaves(kwargs)[pool]
        places[pool] = torch.randn(SLOTS, *state.shape[1:]).to(state)
        places[READ.get(pool, "state_indices")] = torch.tensor([slot], device=DEVICE)
        if name not in ("causal_conv1d", "ssd_block", "mamba_block"):
            places[OUT.get(pool, "out_indices")] = torch.tensor([3], device=DEVICE)
    kwargs = with_leaves(kwargs, places)
    result = outputs(OPS[name], OPS[name].fn(**kwargs))
    return result, {pool: leaves(kwargs)[pool] for pool in POOLS if pool in places}


def test_one_token_takes_the_step() -> None:
    """Decoding is as fast as its cheapest form, on the reference too: bit for bit what the step gives."""
    kwargs = make(OPS["mamba_extend"], dict(b=1, L=1, H=8, P=16, G=1, N=32, K=4), torch.float32) | dict(counts=None)
    again = with_leaves(kwargs, {name: t.clone() for name, t in leaves(kwargs).items()})
    y = OPS["mamba_extend"].fn(**kwargs)
    token, dt = again["xBC"][:, 0], again["dt"][:, 0]
    assert torch.equal(y[:, 0], OPS["mamba_step"].fn(token, dt, again["weights"], again["state"]))
    assert all(torch.equal(t, leaves(again)[name]) for name, t in leaves(kwargs).items())
