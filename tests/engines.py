"""Any requests for an engine, what each would get alone, and an engine that works as on a GPU."""

import random
from typing import Any

import torch
from models import CONFIG

from tt_model import Engine, Request, TwoTower
from tt_model.engine.passes import Pass, Passes
from tt_model.engine.runner import Runner
from tt_model.engine.settings import CONFIDENCES, STRATEGIES

MODES = ("mask_diffusion", "ar", "mock_ar", "speculative")


def free(engine: Engine) -> tuple[int, int, int]:
    """Rows, pages and slots that nobody holds."""
    scheduler = engine._scheduler
    return len(scheduler.rows), len(scheduler.pool.pages.free), len(scheduler.pool.slots.free)


def drawn(r: random.Random) -> tuple[list[int], dict[str, Any]]:
    """Any prompt and settings."""
    prompt = [r.randrange(4, CONFIG.vocab_size) for _ in range(r.choice((1, 2, 7, 30, 64, 65, 90, 130)))]
    found = dict(
        mode=r.choice(MODES),
        max_new_tokens=r.choice((0, 1, 2, 5, 9, 16)),
        block_size=r.choice((1, 3, 8)),
        steps_per_block=r.choice((1, 3, 8)),
        draft_steps=r.choice((1, 2)),
        confidence_threshold=r.choice((0.0, 0.15, 0.5, 1.0)),
        temperature=r.choice((0.0, 0.0, 0.7, 1.5)),
        top_k=r.choice((None, None, 3)),
        top_p=r.choice((None, None, 0.6)),
        eos_token_id=r.choice((None, 7, [5, 11, 12, 13, 20, 21, 22])),
        seed=r.randrange(100),
    )
    more = random.Random(repr(found))  # which changes no other draw
    found["strategy"] = more.choice(("schedule", "schedule", *STRATEGIES))
    found["confidence"] = more.choice(("probability", "probability", *CONFIDENCES))
    found["factor"], found["entropy_bound"] = more.choice((0.5, 1.0)), more.choice((0.1, 4.0))
    found["tempered"], found["alg_temp"] = more.choice((False, True)), more.choice((0.0, 0.0, 0.2))
    return prompt, found


def alone(model: TwoTower, prompt: list[int], options: dict[str, Any]) -> tuple[Any, ...]:
    out = model.generate([prompt], **options)
    return out.tokens[0], out.nfe[0], sum(out.cycles), out.finish_reason[0]


def found(request: Request) -> tuple[Any, ...]:
    result = request.so_far()
    return result.tokens, result.nfe, result.cycles, result.finish_reason


class Replay:
    """A CUDA graph's stand-in: the same work on the rows that lie there now, its outcome where it lay before."""

    def __init__(self, passes: Passes, what: Pass, size: int):
        self.graph, self.rows, self.outcome = self, torch.zeros(size, dtype=torch.int64), None
        self.again = lambda: passes(what, self.rows)

    @torch.inference_mode()
    def replay(self) -> None:
        new = self.again()
        if self.outcome is None:
            self.outcome = new
        for there, t in zip(self.outcome, new, strict=True):
            assert (there is None) == (t is None)
            if there is not None:
                there.copy_(t)


class Replaying(Runner):
    """Works as on a GPU: rows and pages filled up, passes kept by their sizes."""

    def __init__(self, passes: Passes):
        super().__init__(passes, graphs=True)

    def _capture(self, what: Pass, size: int) -> Any:
        return Replay(self.passes, what, size)

    def _free(self, device: torch.device) -> int:
        return 2 << 30


def as_on_a_gpu(engine: Engine) -> Engine:
    engine._batches.runner, engine._batches.ahead = Replaying(engine._batches.passes), 4
    return engine
