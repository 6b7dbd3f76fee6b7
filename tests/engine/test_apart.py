"""A tower on each of two devices: what is read on which, what crosses and how often. Here both are the CPU, which keeps
two pools all the same; or one of them is meta, where a tensor of the other one shows."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import CONFIG as SMALL
from engines import MODES, alone, as_on_a_gpu, drawn, found, free
from models import CONFIG, prompts_of, random_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tt_kernels.runtime.launch import INTERPRET, recording
from tt_model import Engine, TwoTower
from tt_model.checkpoint.keys import DENOISER
from tt_model.checkpoint.read import place
from tt_model.engine.board import Board
from tt_model.engine.passes import Pass, Passes
from tt_model.modeling import pool as pools
from tt_model.modeling.pool import PAGE_SIZE, Buffers
from tt_model.modeling.two_tower import _frequencies

BLOCK = CONFIG.block_size


def apart(**more: Any) -> TwoTower:
    model = random_model(**more)
    model.is_apart = True
    return model


@pytest.fixture(scope="module")
def model() -> TwoTower:
    """On one device."""
    return random_model()


def buffers_of(b: Buffers) -> list[Tensor]:
    return [b.keys.whole, b.values.whole, b.conv.whole, b.ssm.whole]


def everything(board: Board) -> list[Tensor]:
    """Of one of two boards."""
    lanes = [t for lane in board.lanes.values() for t in lane]
    return buffers_of(board.buffers) + [t for t in vars(board).values() if isinstance(t, Tensor)] + lanes


@contextmanager
def poisoned(tensors: Iterable[Tensor]) -> Iterator[None]:
    """NaN, or numbers that are none of a token, page or row, for a while."""
    with torch.inference_mode():
        kept = [(t, t.clone()) for t in tensors]
        for t, _ in kept:
            t.fill_(torch.nan if t.is_floating_point() else True if t.dtype == torch.bool else 1 << 30)
        yield
        for t, old in kept:
            t.copy_(old)


def on_its_side(engine: Engine) -> Engine:
    """Passes of a tower find the other one's pool and board poisoned."""
    passes = engine._batches.passes
    near, far = passes.board, passes.far

    def guard(owner: Any, name: str, other: Board) -> None:
        call = getattr(owner, name)

        def guarded(*args: Any, **more: Any) -> Any:
            with poisoned(everything(other)):
                return call(*args, **more)

        setattr(owner, name, guarded)

    for name in ("_commit", "_ar", "_verify", "_extend", "prefill"):
        guard(passes, name, far)
    guard(passes, "_denoise", near)
    own = engine.model._denoise  # of "mock_ar", too; other engines of the model go on as they were
    passes.model = engine.model.__class__.__new__(engine.model.__class__)
    passes.model.__dict__.update(engine.model.__dict__)
    object.__setattr__(passes.model, "_denoise", own)
    guard(passes.model, "_denoise", near)
    return engine


@pytest.mark.parametrize("replayed", [False, True], ids=["called", "replayed"])
def test_random_requests_get_what_one_device_gives(model: TwoTower, replayed: bool) -> None:
    """All modes beside each other, entering, leaving and cancelled, with beginnings that they share."""
    r = random.Random(int(replayed))
    engine = on_its_side(Engine(apart(), max_rows=5, max_tokens=9 * PAGE_SIZE, max_prefixes=2))
    if replayed:
        as_on_a_gpu(engine)
    before, requests = free(engine), []
    shared = [r.randrange(4, CONFIG.vocab_size) for _ in range(130)]
    while len(requests) < 40 or any(request.is_open for request, *_ in requests):
        if len(requests) < 40 and r.random() < 0.4:
            prompt, options = drawn(r)
            if r.random() < 0.3:
                prompt = shared[: r.choice((65, 100, 129))] + prompt[:20]
            requests.append((engine.submit(prompt, **options), prompt, options))
            if r.random() < 0.05:
                requests.pop()[0].cancel()
        engine.step()
    for request, prompt, options in requests:
        assert found(request) == alone(model, prompt, options), (prompt, options)
    assert any(request.cached_tokens for request, *_ in requests), "no beginning was shared"
    while engine._scheduler.prefixes.drop():
        pass
    assert free(engine) == before
    if replayed:
        kinds = {what.kind for what, _ in engine._batches.runner.captured}
        assert kinds == {"denoise", "commit", "ar", "verify"}, "a graph is of one device"


def test_the_guard_sees_a_read_on_the_wrong_side(model: TwoTower) -> None:
    engine = on_its_side(Engine(apart(), max_rows=1))
    far = engine._board.far
    far.buffers = engine._board.buffers
    request = engine.submit([4, 5, 6], max_new_tokens=20, eos_token_id=None)
    assert request.result().tokens != model.generate([[4, 5, 6]], max_new_tokens=20, eos_token_id=None).tokens[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_prefix(model: TwoTower, mode: str) -> None:
    two, (begin, prompt) = apart(), prompts_of([70, 9])
    options = dict(mode=mode, max_new_tokens=20, eos_token_id=None, seed=3, temperature=0.7)
    want = model.generate([begin + prompt], **options).tokens[0]
    prefix = two.prefill([begin])
    assert Engine(two, max_rows=2).submit(prompt, prefix=prefix, **options).result().tokens == want
    assert two.generate([begin + prompt], **options).tokens[0] == want


def test_logits_are_those_of_one_device(model: TwoTower) -> None:
    two, prompts = apart(), prompts_of([70, 5])
    block, t = torch.full((2, BLOCK), CONFIG.mask_token_id), torch.ones(2)
    one, other = model.prefill(prompts), two.prefill(prompts)
    for _ in range(3):
        with poisoned(buffers_of(other.pool)) if other.pool.stale(other._rows) == [] else poisoned([]):
            assert torch.equal(model.denoise(block, t, one), two.denoise(block, t, other))
        with poisoned(buffers_of(other.pool.far)):
            _, pending = two.verify(block, other)
            other.advance(pending, torch.tensor([3, 8]))
        _, pending = model.verify(block, one)
        one.advance(pending, torch.tensor([3, 8]))


# ---- what crosses ----


class Crossings:
    """Bytes that have gone to another device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.copied: list[tuple[int, int]] = []
        copy = pools._copy

        def counted(source: Tensor, target: Tensor, here: Tensor, there: Tensor) -> None:
            self.copied.append((source.data_ptr(), len(here) * source.nbytes // source.shape[1]))
            copy(source, target, here, there)

        monkeypatch.setattr(pools, "_copy", counted)

    def bytes(self) -> int:
        found = sum(size for _, size in self.copied)
        self.copied.clear()
        return found


def sizes(two: TwoTower) -> tuple[int, int]:
    """Bytes of a page and of a row's states."""
    pool = two.prefill([[4]], reserve=0).pool
    page = (pool.keys.whole.nbytes + pool.values.whole.nbytes) // len(pool.pages)
    return page, (pool.ssm.whole.nbytes + pool.conv.whole.nbytes // 2) // len(pool.slots)


def test_a_block_sends_its_states_and_the_pages_it_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    two = apart()
    (page, states), sent = sizes(two), Crossings(monkeypatch)
    engine = Engine(two, max_rows=1, max_tokens=1024)
    request = engine.submit(prompts_of([130])[0], max_new_tokens=4 * BLOCK, eos_token_id=None, confidence_threshold=1)
    engine.step()
    assert sent.bytes() == 0
    engine.step()
    assert sent.bytes() == states + 3 * page  # all of the prompt
    nfe = request.nfe
    while request.is_open:
        engine.step()
        if request.nfe != nfe:  # a denoiser pass: the first one of a block after the context tower's pass over the last
            assert sent.bytes() == (states + page if (request.nfe - 1) % BLOCK == 0 else 0)
            nfe = request.nfe
    engine.submit([4, 5, 6], mode="ar", max_new_tokens=20, eos_token_id=None).result()
    assert sent.bytes() == 0


def test_forks_and_beginnings_go_once(monkeypatch: pytest.MonkeyPatch) -> None:
    two = apart()
    (page, states), sent = sizes(two), Crossings(monkeypatch)
    cache = two.prefill(prompts_of([130]), reserve=64, forks=3)
    forks = [cache.fork([0, 0]), cache.fork()]
    block = torch.full((2, BLOCK), 4)
    addresses = [t.data_ptr() for b in (cache.pool, cache.pool.far) for t in buffers_of(b)]
    two.denoise(block, torch.ones(2), forks[0])
    assert sent.bytes() == states + 3 * page
    two.denoise(block[:1], torch.ones(1), cache)
    two.denoise(block[:1], torch.ones(1), forks[1])
    assert sent.bytes() == 0
    two.commit(block, forks[0])
    two.denoise(block, torch.ones(2), forks[0])
    assert sent.bytes() == 2 * (states + page)  # each has a page of its own now
    two.denoise(block[:1], torch.ones(1), cache)
    assert sent.bytes() == 0
    assert addresses == [t.data_ptr() for b in (cache.pool, cache.pool.far) for t in buffers_of(b)]


def test_copies_are_made_in_parts(model: TwoTower, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "STAGED", 1)
    two, options = apart(), dict(max_new_tokens=20, eos_token_id=None)
    prompts = prompts_of([200, 5, 66])
    assert two.generate(prompts, **options).tokens == model.generate(prompts, **options).tokens


# ---- devices ----


class Devices(TorchDispatchMode):
    """What operators take that is not of a device."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.foreign = device, list[Any]()

    def check(self, what: Any, arguments: Any) -> None:
        for value in arguments:
            if isinstance(value, Tensor):
                if value.device != self.device:
                    self.foreign.append((what, value.device, tuple(value.shape)))
            elif isinstance(value, tuple | list):
                self.check(what, value)
            elif isinstance(base := getattr(value, "base", None), Tensor):
                self.check(what, [base])

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.check(function, [args, tuple((kwargs or {}).values()), out])
        return out


@pytest.fixture(params=[("cpu", "meta"), ("meta", "cpu")], ids="-".join)
def parted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Passes]:
    near, far = map(torch.device, request.param)
    with torch.device("meta"):
        model = TwoTower(replace(SMALL, dtype=torch.bfloat16)).to(torch.bfloat16).requires_grad_(False)
    for name, p in list(model.named_parameters()):
        place(model, name, far if name.startswith(DENOISER) else near, p.dtype)
    model.is_apart = True

    def across(t: Tensor, device: torch.device) -> Tensor:
        return t.to(device) if t.device.type == "cpu" else torch.zeros_like(t, device=device)

    for module in ("tt_model.modeling.pool", "tt_model.engine.passes"):
        monkeypatch.setattr(f"{module}.across", across)
    with torch.inference_mode():
        board = Board(model, rows=5, pages=8, slots=5)
    yield Passes(model, board)
    _frequencies.cache_clear()


L = SMALL.block_size
PASSES = [
    Pass("denoise", L, 2),
    Pass("denoise", L, 2, narrow=True),
    Pass("commit", L, 2),
    Pass("ar", 1, 2),
    Pass("verify", L, 2),
    Pass("verify", L, 2, narrow=True),
]


@pytest.mark.skipif(INTERPRET, reason="nothing is interpreted here")
@pytest.mark.parametrize("what", PASSES, ids=str)
def test_a_pass_touches_one_device(parted: Passes, what: Pass) -> None:
    device = parted.device(what)
    rows = torch.arange(3, device=device)
    seen = Devices(device)
    _frequencies(parted.model.t_embedder.size // 2, torch.float32, parted.far.device)  # made on the CPU, once
    with recording(90) as launches, seen:
        outcome = parted(what, rows)
    for kernel, _, args, _ in launches:
        seen.check(kernel.__name__, args)
    assert not seen.foreign and len(launches) >= len(SMALL.pattern)
    assert device == (parted.far if what.kind == "denoise" else parted.board).device
    assert all(t is None or t.device == device for t in outcome)


@pytest.mark.skipif(INTERPRET, reason="nothing is interpreted here")
def test_what_crosses_lands_on_the_other_device(parted: Passes) -> None:
    class Held:
        pages, slot, length = [0, 1], 2, 100

    assert parted.to_denoiser([1], [Held()]) == [0] and parted.to_denoiser([1], [Held()]) == []
    parted.start(torch.arange(2, device=parted.board.device), L, draft=True)
    parted.to_context([0, 1], L)
    with recording(90):
        outcome = parted(Pass("mock_ar", 1, 2), torch.arange(3, device=parted.board.device))
    assert outcome.tokens.device == parted.board.device
    for board in (parted.board, parted.far):
        assert all(t.device == board.device for t in everything(board))


# ---- loading ----


def test_from_pretrained_with_two_devices() -> None:
    two = TwoTower.from_pretrained(device=("cpu", "cpu"))
    assert two.is_apart and two.far == two.device == torch.device("cpu")
    for one in ("cpu", ["cpu"]):
        assert not TwoTower.from_pretrained(device=one).is_apart
    assert TwoTower.from_pretrained(device="cpu,cpu").is_apart
    ids = torch.zeros(1, two.config.block_size, dtype=torch.int64)
    states = two.encode_clean(ids, two.config.block_size)
    with pytest.raises(ValueError, match="denoise_all: the towers are on two devices; training takes one"):
        two.denoise_all(states, ids, torch.ones(1, 1))


@pytest.mark.parametrize(
    ("device", "more", "message"),
    [
        (("cpu",) * 3, {}, r"device is \('cpu', 'cpu', 'cpu'\), expected one, or two: the context tower's and"),
        (("cpu", "cpu"), dict(towers="context"), 'expected one for towers="context"'),
        (("cpu", "abacus"), {}, "device is 'abacus', expected something like cpu"),
        ("cpu,cuda:99", {}, "device is 'cuda:99', but there are"),
        ("cpu,", {}, "device is '', expected something like cpu"),
        ((), {}, r"device is \(\), expected"),
    ],
)
def test_two_devices_that_are_refused(device: Any, more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoTower.from_pretrained(device=device, **more)


def test_two_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="expected two of one kind"):
        TwoTower.from_pretrained(device="cpu,cuda:1")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_beside_itself(dtype: torch.dtype) -> None:
    """Two pools on one GPU, graphs and what is called between them: the tokens of one pool."""
    made = []
    for device in ("cuda:0", ("cuda:0", "cuda:0")):
        engine = Engine(TwoTower.from_pretrained(device=device, dtype=dtype), max_rows=5, max_tokens=4096)
        requests = [
            engine.submit([5 + b] * (1 + 13 * b), mode=mode, max_new_tokens=40, temperature=t, seed=b)
            for b, (mode, t) in enumerate((mode, t) for mode in MODES for t in (0.0, 0.7))
        ]
        made.append([request.result().tokens for request in requests])
        assert engine._batches.runner.captured and not engine._batches.runner.refused
    assert made[0] == made[1]
