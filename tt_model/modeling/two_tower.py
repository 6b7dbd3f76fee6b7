"""The two towers together: prefill, denoise, commit, verify, and the training forms.

B batch, P prompt length, L block length, N tokens of a training row, S block size, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..arguments import integer, is_integer, token_rows
from ..config import TwoTowerConfig
from ..vocabulary import Vocabulary
from .constants import Constant
from .linear import Linear
from .state import Cache, CleanStates, ForwardContext, Pending, View
from .tower import Tower

# Tokens of all prompts that go through the tower at a time: bounds memory, to less than a gigabyte of activations of
# the published model. Every stretch reads all experts: 59 GB, 14 ms of an H200's memory; 2048 tokens' products 18 ms.
PREFILL_CHUNK = 8192
_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def prefill_stretch(rows: int) -> int:
    """Tokens of each prompt that go through the tower at a time: whole tiles of 64, one at least, as the weights are
    read each time."""
    return max(1, PREFILL_CHUNK // rows // 64) * 64


def _make_frequencies(half: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """10000^(-j / half), made on the CPU whatever the device: an ulp of a frequency is 1e-5 of the logits."""
    with torch.inference_mode(False):  # made once, and used in training too
        return torch.exp(-math.log(10000) * torch.arange(half, dtype=dtype, device="cpu") / half).to(device)


_frequencies = lru_cache(maxsize=16)(_make_frequencies)


def _stacked(*tables: Tensor) -> Tensor:
    return torch.stack(tables)


class TimeEmbedder(nn.Module):
    """t [M] -> [M, D]: cosines and sines of 1000 t at 128 frequencies, then an MLP."""

    def __init__(self, size: int, D: int):
        super().__init__()
        self.size = size
        self.mlp = nn.Sequential(nn.Linear(size, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, t_M: Tensor) -> Tensor:
        dtype, half = cast(nn.Linear, self.mlp[0]).weight.dtype, self.size // 2
        acc = torch.promote_types(dtype, torch.float32)
        # A trace computes with stand-ins for tensors: what it makes must not stay behind for later calls.
        traced = torch.compiler.is_compiling() or type(t_M) is not Tensor
        frequencies = _make_frequencies if traced else _frequencies
        angles = (t_M.to(dtype) * 1000).unsqueeze(-1) * frequencies(half, acc, t_M.device)  # [M, 128], in acc
        waves = angles.new_empty(len(t_M), self.size, dtype=dtype)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1, out=waves))


class TwoTowerModel(nn.Module):
    """Nemotron-Labs-TwoTower (arXiv 2606.26493): a causal context tower and a block denoiser conditioned on it.

    Load one with `TwoTower.from_pretrained`; the constructor makes an uninitialised model of a config. With
    `towers="context"` there is no denoiser: only autoregressive use, half the memory.

    The mask token's id may stand anywhere in clean text, as in the published implementation, whose autoregressive modes
    write it: the context tower reads it as the ordinary token that its embedding makes it, in `prefill`, `commit`,
    `verify` and `encode_clean` alike, and nothing fills it in. Only in the block given to `denoise` does it mean a
    position to be filled. In a prompt it is most likely a mistake: `generate` warns.

    Cast to 16 bits (`to`, `half`, `bfloat16`), it keeps `checkpoint.FP32_PARAMETERS` in fp32, as loading does.

    Attributes:
        is_apart: whether the denoiser reads copies of what the context tower keeps: where `from_pretrained` was given
            two devices.
        source: the folder that it was loaded from, None for a model that was made; `checkpoint.save` copies from it.
    """

    def __init__(self, config: TwoTowerConfig, *, towers: str = "both"):
        super().__init__()
        if towers not in ("both", "context"):
            raise ValueError(f'towers is {towers!r}, expected "both" or "context"')
        self.config = config
        self.source: Path | None = None
        self.is_apart = False
        D, V = config.hidden_size, config.vocab_size
        self.context_tower = Tower(config)
        self.context_lm_head = Linear(D, V, bias=False)
        self.denoiser_tower: Tower | None = None
        if towers == "both":
            self.denoiser_tower = Tower(config)
            self.lm_head = Linear(D, V, bias=False)
            self.t_embedder = TimeEmbedder(config.time_embedding_size, D)
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 3 * D))
            tables = (nn.Parameter(torch.zeros(3, D)) for _ in config.pattern)
            self.scale_shift_tables = nn.ParameterList(tables)
            self.tables = Constant(_stacked)

    @property
    def device(self) -> torch.device:
        """Of the context tower."""
        return self.context_lm_head.weight.device

    @property
    def far(self) -> torch.device | None:
        """Of the denoiser, where the towers are apart."""
        return self.lm_head.weight.device if self.is_apart else None

    @property
    def dtype(self) -> torch.dtype:
        return self.context_lm_head.weight.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """Of cached keys and values: as they are projected."""
        kind = self.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if autocast and self.dtype != torch.float64 else self.dtype

    @cached_property
    def tokenizer(self) -> Vocabulary:
        """Text to the ids that the model reads (`encode`, `chat`), and back (`decode`). ValueError where the folder
        that the model was loaded from has no tokenizer.json, or one of another vocabulary."""
        if self.source is None:
            raise ValueError("tokenizer: the model was not loaded from a folder; give prompts as token ids")
        return Vocabulary(self.source, self.config)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer.json where it was loaded from."""
        return self.source is not None and (self.source / "tokenizer.json").is_file()

    # ---- generation: tokens in, logits and caches out ----

    def context_logits(self, ids: Tensor) -> Tensor:
        """Next-token logits of the context tower at every position.

        Args:
            ids: [B, P] int64.
        Returns:
            [B, P, V], in the model's dtype.
        """
        ids = self._ids("ids", ids)
        return self.context_lm_head(self.context_tower(ids, ForwardContext("clean")))

    @torch.no_grad()
    def prefill(self, prompts: Tensor | Sequence[Sequence[int]], *, reserve: int = 1024, forks: int = 0) -> Cache:
        """Run the context tower over prompts.

        Args:
            prompts: [B, P] int64, or B lists of token ids of any lengths from 1.
            reserve: further tokens per row to make room for. Where more enter, all pages are copied to twice the room.
            forks: further rows that `Cache.fork` will make, to make room for; likewise.
        Returns:
            a Cache of all tokens; `cache.last_logits` [B, V] predicts the next one of each row.
        Cost: one pass of the context tower in stretches of 8192 tokens of all rows together, but 64 of each at
        least; shorter rows of a ragged batch are padded.
        """
        rows = self._rows(prompts)
        return self._prefill(rows, integer("reserve", reserve, 0), integer("forks", forks, 0))

    def _rows(self, prompts: Tensor | Sequence[Sequence[int]]) -> list[list[int]]:
        """Prompts as lists of ids, each of at least one."""
        rows = token_rows(prompts, self.config.vocab_size)
        if not rows:
            raise ValueError("prompts: expected at least one")
        if not all(rows):
            raise ValueError(f"prompts: prompt {rows.index([])} is empty: every prompt needs at least one token")
        return rows

    def _prefill(self, rows: Sequence[Sequence[int] | Tensor], reserve: int, forks: int = 0) -> Cache:
        """`prefill`, where a row may also be empty (mock-AR starts one token early)."""
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        padded = pad_sequence([torch.as_tensor(row, dtype=torch.int64, device="cpu") for row in rows], batch_first=True)
        ids = self._ids("prompts", padded)
        cache = Cache.empty(
            self.config,
            len(rows),
            device=self.device,
            dtype=self.state_dtype,
            far=self.far,
            reserve=longest + reserve,
            forks=forks,
        )
        cache.head = self.context_lm_head.matrix
        stretch = prefill_stretch(len(rows))
        for start in range(0, longest, stretch):
            chunk = ids[:, start : start + stretch]
            self._extend(chunk, cache, [min(max(length - start, 0), chunk.shape[1]) for length in lengths])
        return cache

    def _extend(self, ids: Tensor, cache: Cache, counts: list[int]) -> None:
        """Let the first counts[b] of the tokens [B, L] into the cache."""
        cache.prepare(counts)
        whole = min(counts) == ids.shape[1]
        entered = None if whole else torch.tensor(counts, dtype=torch.int32, device=self.device)
        hidden = self.context_tower(ids, ForwardContext("extend", cache, entered))
        cache.extend(counts, hidden, entered)

    @torch.no_grad()
    def denoise(self, block: Tensor, t: Tensor | None, cache: Cache, output: str = "logits") -> Tensor:
        """One denoiser pass over a noisy block that follows the cache; the cache is only read.

        Args:
            block: [B, L] int64, masked positions holding `config.mask_token_id`.
            t:     [B] float, each row's masked fraction; None: no time conditioning (mock-AR).
            output: "logits" or "hidden".
        Returns:
            [B, L, V] logits (the mask token is not suppressed), or [B, L, D] hidden states after the final norm; on
            the denoiser's device.
        """
        self._denoiser()
        block = self._block("denoise", block, cache, self.far)
        if t is not None and (not isinstance(t, Tensor) or t.shape != (cache.batch,)):
            found = f"has shape {list(t.shape)}" if isinstance(t, Tensor) else f"is {t!r}"
            raise ValueError(f"denoise: t {found}, expected [B] with the cache's B={cache.batch}, or None")
        return self._output(self._denoise(block, t, cache.for_denoiser()), output)

    def _denoise(self, block: Tensor, t: Tensor | None, view: View) -> Tensor:
        """Hidden states [B, L, D] of a block that is known to be right."""
        modulation = None if t is None else self._modulation(t)
        return self._denoiser()(block, ForwardContext("denoise", view), modulation)

    @torch.no_grad()
    def commit(self, block: Tensor, cache: Cache) -> None:
        """Run the context tower over a finished block [B, L]: all of it enters the cache."""
        block = self._block("commit", block, cache)
        self._extend(block, cache, [block.shape[1]] * cache.batch)

    @torch.no_grad()
    def verify(self, block: Tensor, cache: Cache) -> tuple[Tensor, Pending]:
        """The context tower over a block [B, L] without writing the cache.

        Returns:
            logits [B, L, V]: position i predicts the token after block[:, : i + 1]
            pending: for `cache.advance(pending, counts)`, which lets the first counts[b] tokens in.
        """
        pending = self._verify(block, cache)
        assert pending.hidden is not None
        return self.context_lm_head(pending.hidden), pending

    def _verify(self, block: Tensor, cache: Cache) -> Pending:
        block = self._block("verify", block, cache)
        pending = Pending(lengths=cache.lengths.clone(), cache=cache)
        pending.hidden = self.context_tower(block, ForwardContext("verify", cache, pending=pending))
        return pending

    # ---- training: whole sequences ----

    @torch.no_grad()
    def encode_clean(self, clean: Tensor, block_size: int, cu_seqlens: Tensor | None = None) -> CleanStates:
        """The context tower over clean sequences, keeping what every noisy block needs.

        Args:
            clean: [B, N] int64, N a multiple of block_size.
            cu_seqlens: [n + 1] int32 over the flattened B * N tokens: where packed sequences begin and end, multiples
                of block_size; every row begins one. None: every row is one sequence.
        Returns:
            K/V of all attention layers [B, N, Hkv, P] and conv and SSM states before every block. No gradient.
        """
        clean = self._ids("clean", clean)
        if not is_integer(block_size) or block_size < 1:
            raise ValueError(f"encode_clean: {block_size=}, expected at least 1")
        if cu_seqlens is not None and bool((cu_seqlens % block_size).any()):
            raise ValueError(f"encode_clean: cu_seqlens is {cu_seqlens.tolist()}, expected multiples of {block_size=}")
        if clean.shape[1] % block_size:
            raise ValueError(f"encode_clean: clean has N={clean.shape[1]}, expected a multiple of {block_size=}")
        states = CleanStates(block_size, cu_seqlens)
        states.hidden = self.context_tower(clean, ForwardContext("clean", keep=states, cu_seqlens=cu_seqlens))
        return states

    def denoise_all(self, ctx: CleanStates, noisy: Tensor, t: Tensor, output: str = "logits") -> Tensor:
        """Every noisy block against the clean blocks before it, in one pass, with gradients.

        Args:
            ctx:   from `encode_clean`.
            noisy: [B, N] int64.
            t:     [B, N / S] float, each block's masking probability or masked fraction.
        Returns:
            [B, N, V] logits or [B, N, D] hidden states; equal to `prefill` + `denoise` block by block.
        """
        if self.is_apart:
            raise ValueError("denoise_all: the towers are on two devices; training takes one")
        noisy, S = self._ids("noisy", noisy), ctx.block_size
        if t.shape != (noisy.shape[0], noisy.shape[1] // S):
            shape = list(noisy.shape)
            raise ValueError(f"denoise_all: t has shape {list(t.shape)}, expected [B, N / {S}] for noisy {shape}")
        blocks = noisy.reshape(-1, S)
        h = self._denoiser()(blocks, ForwardContext("noisy", clean=ctx), self._modulation(t.flatten()))
        return self._output(h.view(*noisy.shape, -1), output)

    # ---- parts ----

    def _denoiser(self) -> Tower:
        if self.denoiser_tower is None:
            raise ValueError('this model was loaded with towers="context": it has no denoiser, only mode="ar" works')
        return self.denoiser_tower

    def _modulation(self, t_M: Tensor) -> Tensor:
        """(shift, scale, gate) of every layer: [layers, 3, M, D]."""
        shared = self.t_block(self.t_embedder(t_M.to(self.far or self.device)))  # [M, 3 * D]
        tables = self.tables(*self.scale_shift_tables)  # [layers, 3, D]
        return tables.unsqueeze(2) + shared.view(len(t_M), 3, -1).transpose(0, 1)

    def _output(self, h: Tensor, output: str) -> Tensor:
        if output not in ("logits", "hidden"):
            raise ValueError(f'output is {output!r}, expected "logits" or "hidden"')
        return self.lm_head(h) if output == "logits" else h

    def _ids(self, name: str, ids: Tensor, device: torch.device | None = None) -> Tensor:
        if not isinstance(ids, Tensor):
            raise ValueError(f"{name} is {ids!r:.40}, expected a tensor [B, L] of integers")
        if ids.dim() != 2 or ids.dtype not in _ID_DTYPES:
            raise ValueError(f"{name} has shape {list(ids.shape)} and dtype {ids.dtype}, expected [B, L] of integers")
        # On a GPU this would wait for the device at every pass: what is there, or in a graph, is the caller's word.
        seen = ids.device.type == "cpu" and not torch.compiler.is_compiling()
        low, high = map(int, ids.aminmax()) if seen and ids.numel() else (0, 0)
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"{name} holds token id {bad}, expected 0 to {self.config.vocab_size - 1}")
        return ids.to(device or self.device, torch.int64)

    def _block(self, op: str, block: Tensor, cache: Cache, device: torch.device | None = None) -> Tensor:
        if isinstance(block, Tensor) and (block.dim() != 2 or len(block) != cache.batch or block.shape[1] == 0):
            expected = f"[B, L] with the cache's B={cache.batch}"
            raise ValueError(f"{op}: block has shape {list(block.shape)}, expected {expected}")
        return self._ids(f"{op}: block", block, device)
