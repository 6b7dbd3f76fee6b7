"""A generation as it went, pass by pass, on one page of HTML that replays it and needs nothing beside itself."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..files import read_text, write_text
from ..modeling.moe import MoE
from ..modeling.two_tower import TwoTowerModel
from ..vocabulary import Vocabulary
from .settings import Generation, Step

TEMPLATE = Path(__file__).with_name("trace.html")
MODES = {
    "mask_diffusion": "block diffusion",
    "ar": "autoregressive",
    "mock_ar": "the denoiser, a token a pass",
    "speculative": "speculative",
}
# Modes that follow a setting; the others follow all.
SETTINGS_OF = {
    "steps_per_block": ("mask_diffusion",),
    "draft_steps": ("speculative",),
    "block_size": ("mask_diffusion", "speculative"),
    "confidence_threshold": ("mask_diffusion", "speculative"),
    "strategy": ("mask_diffusion", "speculative"),
    "confidence": ("mask_diffusion", "speculative"),
    "factor": ("mask_diffusion", "speculative"),
    "entropy_bound": ("mask_diffusion", "speculative"),
    "tempered": ("mask_diffusion", "speculative"),
    "alg_temp": ("mask_diffusion", "speculative"),
}
# Strategies that follow a setting; the others follow all.
RULES_OF = {
    "steps_per_block": ("schedule", "static"),
    "confidence_threshold": ("schedule", "threshold"),
    "factor": ("factor",),
    "entropy_bound": ("entropy_bound",),
}
COMMON = {"strategy": "schedule", "confidence": "probability", "tempered": False, "alg_temp": 0.0}  # not worth a word
REASONS = {"eos": "end token", "stop": "stop text", "length": "length", "cancelled": "interruption"}


@dataclass(frozen=True)
class _Pass:
    """What a `Step` told of one row."""

    shared: int  # which Step
    start: int  # position in the sequence
    step: int
    ids: list[int]  # [L]
    confidence: list[int]  # [L] in thousandths
    taken: list[int]  # places in the block that took their token


class Trace:
    """What `on_step` tells, recorded; `page` shows it.

    With a model it also counts, between `__enter__` and `__exit__`, how many tokens each expert of each MoE layer of
    the denoiser got in a pass, all rows together; in `speculative`, in the passes of a draft.

    Example:
        >>> model, trace = TwoTower.from_pretrained(), Trace()
        >>> out = model.generate("def f(x):", on_step=trace)
        >>> trace.write("out.html", out, ["def f(x):"], model.tokenizer)
    """

    def __init__(self, model: TwoTowerModel | None = None):
        self.rows: dict[int, list[_Pass]] = {}
        self.steps = 0
        self.layers: dict[int, MoE] = {}  # those counted, by their place in the tower
        self.load: list[list[list[int]]] = []  # [step][layer][expert] tokens
        if model is not None:
            tower = model.denoiser_tower
            found = enumerate(tower.layers) if tower is not None else ()
            self.layers = {i: layer.mixer for i, layer in found if isinstance(layer.mixer, MoE)}
            if not self.layers:
                raise ValueError("model: has no denoiser with experts, whose tokens could be counted")

    def __enter__(self) -> Trace:
        for moe in self.layers.values():
            experts, device = moe.config.n_routed_experts, moe.gate.weight.device
            moe.load = torch.zeros(experts, dtype=torch.int64, device=device)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for moe in self.layers.values():
            moe.load = None

    def __call__(self, step: Step) -> None:
        results = (step.tokens, (step.confidence.double() * 1000).round().long(), step.committed)
        for row, start, ids, sure, taken in zip(step.rows, step.start, *(r.tolist() for r in results), strict=True):
            places = [i for i, now in enumerate(taken) if now]
            self.rows.setdefault(row, []).append(_Pass(self.steps, start, step.step, ids, sure, places))
        if loads := [moe.load for moe in self.layers.values() if moe.load is not None]:
            self.load.append(torch.stack(loads).tolist())
            for load in loads:
                load.zero_()
        self.steps += 1

    def write(self, path: str | Path, *what: Any, **more: Any) -> None:
        """`page` as a file, whole or not at all."""
        write_text(Path(path), self.page(*what, **more))

    def page(
        self,
        out: Generation,
        prompts: Sequence[str | Sequence[int]],
        vocabulary: Vocabulary | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """The page.

        Args:
            out:        what the generation returned.
            prompts:    what it continued, as texts or ids.
            vocabulary: to read tokens with; None: their ids are shown.
            settings:   what to say of how it was made; `mode` where it is not "mask_diffusion".
        """
        if len(prompts) != len(out.tokens):
            raise ValueError(f"prompts: {len(prompts)}, expected those of the {len(out.tokens)} rows generated")
        said = {"mode": "mask_diffusion"} | dict(settings or {})
        rows = [_Row(self.rows.get(b, []), out, b, said["mode"]).data(vocabulary) for b in range(len(prompts))]
        shown = [_prompt(prompt, vocabulary) for prompt in prompts]
        data = {
            "mode": said["mode"],
            "unit": {"mask_diffusion": "Pass", "speculative": "Cycle"}.get(said["mode"], "Token"),
            "title": MODES.get(said["mode"], said["mode"]),
            "settings": [
                f"{name.replace('_', ' ')} {_value(v)}" for name, v in said.items() if _is_said(name, v, said)
            ],
            "rows": [row | {"prompt": prompt} for row, prompt in zip(rows, shown, strict=True)],
            "experts": self._experts(),
        }
        texts = ["".join(cell[0] for cell in row["cells"] if not cell[6]) for row in rows]
        title = f"TwoTower trace: {' '.join(shown[0].split())[:60]}"
        values = {
            "title": html.escape(title),
            "text": html.escape("\n\n".join(map("".join, zip(shown, texts, strict=True)))),
            "data": script_json(data),
        }
        return re.sub(r"\{\{(\w+)\}\}", lambda hole: values[hole[1]], read_text(TEMPLATE))

    def _experts(self) -> dict[str, Any] | None:
        """Tokens of every expert in every Step, with what a line says of a layer: how many were used, the most."""
        if not self.layers:
            return None
        most = max((count for step in self.load for layer in step for count in layer), default=0)
        said = lambda counts: f"{sum(c > 0 for c in counts)} of {len(counts)} used, at most {max(counts)} tokens each"
        lines = [[said(counts) for counts in step] for step in self.load]
        return {"layers": list(self.layers), "load": self.load, "lines": lines, "most": most}


class _Row:
    """One prompt's passes, and what the page says of them."""

    def __init__(self, passes: list[_Pass], out: Generation, row: int, mode: str):
        self.passes, self.mode, self.kept = passes, mode, len(out.tokens[row])
        self.nfe, self.forwards = out.nfe[row], out.forwards[row]
        self.reason = out.finish_reason[row] if row < len(out.finish_reason) else ""
        # Where blocks begin; in the other modes every token is one, and every cycle.
        self.starts = list(dict.fromkeys(p.start for p in passes))
        self.first = passes[0].start if passes else 0
        size = max((p.start + len(p.ids) for p in passes), default=self.first) - self.first
        self.ids: list[int | None] = [None] * size  # of each place; None: never resolved
        self.at, self.sure, self.seen = [0] * size, [0] * size, [0] * size  # passes count from 1; seen: masked after it
        for n, p in reversed(list(enumerate(passes, 1))):
            begin = p.start - self.first
            self.seen[begin : begin + len(p.ids)] = [n - 1] * len(p.ids)
            for i in p.taken:
                self.ids[begin + i], self.at[begin + i], self.sure[begin + i] = p.ids[i], n, p.confidence[i]

    def figures(self) -> dict[str, str]:
        """The figures of the generation, by their names."""
        found = {"tokens": f"{self.kept}"}
        ratio = lambda passes: f"{self.kept / passes:.2f}" if passes else "–"
        if self.mode != "ar":
            found |= {"denoiser passes": f"{self.nfe}", "tokens per denoiser pass": ratio(self.nfe)}
        found |= {
            "passes of both towers": f"{self.forwards}",
            "tokens per pass of both": ratio(self.forwards),
        }
        if self.mode == "mask_diffusion":
            found["blocks"] = f"{len(self.starts)}"
        if self.mode == "speculative":
            accepted, drafted = (sum(column) for column in zip((0, 0), *map(_draft, self.passes), strict=True))
            found |= {"cycles": f"{len(self.passes)}", "drafted tokens accepted": f"{accepted} of {drafted}"}
        if self.reason:
            found["ended by"] = REASONS.get(self.reason, self.reason)
        return found

    def lines(self) -> list[str]:
        """A line on every pass, after one on the beginning."""
        found, written = ["before the first"], 0
        number = {start: n for n, start in enumerate(self.starts, 1)}
        last = {p.start: p.step + 1 for p in self.passes}
        for n, p in enumerate(self.passes, 1):
            written += sum(p.start - self.first + i < self.kept for i in p.taken)
            so_far = f"{written} of {self.kept} tokens written"
            if self.mode == "mask_diffusion":
                taken = f"{_count(len(p.taken), 'token')} taken, {self._masked_after(n)} masked"
                found.append(f"block {number[p.start]}, pass {p.step + 1} of {last[p.start]}: {taken}; {so_far}")
            elif self.mode == "speculative":
                accepted, drafted = _draft(p)
                found.append(f"{accepted} of {_count(drafted, 'drafted token')} accepted; {so_far}")
            else:
                found.append(f"probability {p.confidence[0] / 1000:.3f}; {so_far}")
        return found

    def _masked_after(self, n: int) -> int:
        """Places of the block that are still masked after pass n."""
        p = self.passes[n - 1]
        begin = p.start - self.first
        return sum(not 0 < at <= n for at in self.at[begin : begin + len(p.ids)])

    def cells(self, vocabulary: Vocabulary | None) -> Iterator[list[Any]]:
        """What is shown in one box: text, first place, ids, pass, probability, pass after which it is seen, kind.

        A character whose bytes are several tokens is one box: the last of their passes, the least of their
        probabilities. Kinds: special, dropped (behind the end), open (never resolved), or none of these.
        """
        at = 0
        runs = groupby(enumerate(self.ids), key=lambda place: (place[1] is None, place[0] < self.kept))
        for (is_open, is_kept), run in runs:
            known = [token for _, token in run]
            ids = [token for token in known if token is not None]
            pieces: Iterable[tuple[str, int]]
            if is_open:
                pieces = [(" ", 1)] * len(known)
            elif vocabulary:
                pieces = vocabulary.pieces(ids)
            else:
                pieces = ((f"{token} ", 1) for token in ids)
            for text, count in pieces:
                places = slice(at, at + count)
                own = [token for token in self.ids[places] if token is not None]
                kind = "open" if is_open else "" if is_kept else "dropped"
                if not text and vocabulary:
                    text = "".join(vocabulary.tokenizer.id_to_token(token) or "?" for token in own)
                    kind = kind or "special"
                taken = 0 if is_open else max(self.at[places])
                yield [text, at, own, taken, min(self.sure[places]), min(self.seen[places]), kind]
                at += count

    def data(self, vocabulary: Vocabulary | None) -> dict[str, Any]:
        number = {start: i for i, start in enumerate(self.starts)}
        one = self.mode != "mask_diffusion"  # nothing that groups passes
        token = self.mode in ("ar", "mock_ar")
        most = max((len(p.taken) for p in self.passes), default=1)
        passes = [
            {
                "start": p.start - self.first,
                "block": 0 if one else number[p.start],
                "confidence": p.confidence,
                "mean": round(sum(p.confidence[i] for i in p.taken) / max(1, len(p.taken))),
                "share": p.confidence[0] if token else round(1000 * len(p.taken) / max(1, most)),
                "step": p.shared,
            }
            for p in self.passes
        ]
        return {
            "figures": self.figures(),
            "lines": self.lines(),
            "passes": passes,
            "cells": list(self.cells(vocabulary)),
        }


def _draft(p: _Pass) -> tuple[int, int]:
    """Of a cycle, how many drafted tokens entered, and how many there were: its first token is no draft."""
    return max(0, len(p.taken) - 1), len(p.ids) - 1


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _prompt(prompt: str | Sequence[int], vocabulary: Vocabulary | None) -> str:
    if isinstance(prompt, str):
        return prompt
    return vocabulary.decode(prompt) if vocabulary else " ".join(map(str, prompt)) + " "


def _is_said(name: str, value: Any, said: Mapping[str, Any]) -> bool:
    if value is None or value in ((), [], "") or name in ("mode", "logprobs", "max_new_tokens", "eos_token_ids"):
        return False
    rule = said.get("strategy", COMMON["strategy"])
    followed = said["mode"] in SETTINGS_OF.get(name, MODES) and rule in RULES_OF.get(name, (rule,))
    return followed and COMMON.get(name) != value


def _value(value: Any) -> str:
    return ", ".join(map(repr, value)) if isinstance(value, list | tuple) else str(value)


def script_json(value: Any) -> str:
    """JSON that may stand in a script element: ASCII, without a character that could end or begin markup."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
