"""A pytest plugin, `-p sanitize` with TT_KERNELS_ON_CPU=1: ttsem executes on the CPU what Triton makes of each launch,
in bf16 too. A fault fails the test that launched it: an access outside a tensor, a race between programs, an
operation with an undefined result. Memory that nobody wrote holds NaN. `make sanitize` runs it."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from parity import SANITIZE
from ttsem import _fakedriver, ops, pidraces, sanitize

# Loads that may meet another program's store, by their IR. A descriptor takes whole tiles of the cache: in the last one
# also tokens behind the row's length, which `append_attention` writes in the same launch. Their scores are masked and
# their values replaced by 0, so none of these bytes is used; loads by pointer, of the same tokens, are checked.
UNUSED = ('"tt.descriptor_load"(%k_desc,', '"tt.descriptor_load"(%v_desc,')
ORDERS = "sem = 4 "  # in the IR of an atomic that both acquires and releases
# `widen` in moe/route_kernels.py, the only assembly in our kernels.
ops.PTX_FRAGMENTS["cvt.f64.f32 $0, $1;"] = (lambda x: [np.asarray(x, np.float32).astype(np.float64)], None)

_chained, _any_race = ops._fma_chain, pidraces.find_race


def summed(a: np.ndarray, b: np.ndarray, c: np.ndarray, dtype: type) -> np.ndarray:
    """c + a b as tensor cores sum it: 16 products of 16-bit numbers, then one rounding to fp32. ttsem rounds after each
    product, as FMA instructions do, and sums of 64 are then off by more than the bound of a test allows."""
    if dtype != np.float32 or not ops._exact_in_f32(np.asarray(a), np.asarray(b)):
        return _chained(a, b, c, dtype)
    for k in range(0, a.shape[-1], 16):
        part = a[..., k : k + 16].astype(np.float64), b[..., k : k + 16, :].astype(np.float64)
        c = _chained(*part, c, np.float64).astype(np.float32)
    return c


def find_race(log: list[pidraces.Entry] | None) -> pidraces.PidRace | None:
    log = [entry for entry in log or () if not any(load in entry[2] for load in UNUSED)]
    return unordered(log) if any(kind == "a" for _, kind, *_ in log) else _any_race(log)


def unordered(log: list[pidraces.Entry]) -> pidraces.PidRace | None:
    """The first two accesses of one address that no chain of atomics orders, which ttsem does not look for.

    Programs run one after the other. Who updates an address atomically knows what all who did so before had done until
    then. That they were before holds for this order of programs only: it is the reverse of what a fault would hope for.
    """
    known: dict[Any, dict[Any, int]] = {}  # program -> what it knows of others: how far in the log
    handed: dict[int, dict[Any, int]] = {}  # address of atomics -> what comes with it
    stored: dict[int, int] = {}  # address -> its last store, as an index into the log
    loaded: dict[int, dict[Any, int]] = {}  # address -> each program's last load since
    for index, (program, kind, op, addresses, size, _) in enumerate(log):
        mine = known.setdefault(program, {})
        orders = kind == "a" and ORDERS in op
        for address in addresses.tolist():
            if orders:
                mine |= {who: max(at, mine.get(who, -1)) for who, at in handed.get(address, {}).items()}
            others = [stored[address]] if address in stored and not kind == log[stored[address]][1] == "a" else []
            if kind in "wa":
                others += loaded.pop(address, {}).values()
                stored[address] = index
            else:  # also a store of what is there already
                loaded.setdefault(address, {})[program] = index
            for other in others:
                if log[other][0] != program and mine.get(log[other][0], -1) < other:
                    sides = [log[at][:3] for at in (other, index)]
                    return pidraces.PidRace("not ordered by atomics", address, *sides, size)
            if orders:
                handed[address] = mine | {program: index}
    return None


def unchecked() -> None:
    raise AssertionError("the launch makes too many accesses to be checked for races: take a smaller case")


def pytest_configure(config: pytest.Config) -> None:
    if not SANITIZE:
        raise pytest.UsageError("sanitize: set TT_KERNELS_ON_CPU=1, and not TRITON_INTERPRET")
    ops._fma_chain, pidraces.find_race = summed, find_race
    os.environ["TTSEM_GRID_ORDER"] = "reverse"  # the interpreter runs programs from the first to the last
    session: Any = sanitize.session(90, "pytest", cuda_is_cpu=False, on_unchecked=unchecked)
    session.__enter__()
    config.add_cleanup(lambda: session.__exit__(None, None, None))
    _fakedriver.unstub_torch_cuda()  # tests ask torch whether there is a GPU, and there is none
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory, also inside registered ops
