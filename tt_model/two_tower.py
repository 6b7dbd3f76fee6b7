"""The model with its two conveniences: loading by a path, and generating by a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .arguments import devices_of, dtype_of
from .config import TwoTowerConfig
from .engine.generate import KEPT, Stream, generate
from .engine.prompts import prompt_ids
from .engine.settings import Generation, Settings, Step
from .modeling import compiled
from .modeling.two_tower import TwoTowerModel
from .vocabulary import Vocabulary

ASSETS = Path(__file__).parent / "assets"


class TwoTower(TwoTowerModel):
    __doc__ = TwoTowerModel.__doc__

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        dtype: torch.dtype | None = None,
        towers: str = "both",
        progress: bool = True,
    ) -> TwoTower:
        """Load a checkpoint folder: the published layout, or with `towers="context"` a plain Nemotron-3-Nano.

        Args:
            path:   folder with config.json and safetensors; None: the small model that comes with the package.
            device: None: the current CUDA device if there is one, else the CPU. Two, as ("cuda:0", "cuda:1"): a tower
                on each, the denoiser with its head and time modules on the second. Generation works as on one; the
                denoiser reads copies of what the context tower keeps, made on its device block by block.
            dtype:  of the parameters; None: the one that config.json names. Router and scan parameters stay fp32.
            towers: "both", or "context" for autoregressive use only, at half the memory.
            progress: show a bar on stderr while loading takes more than a second.
        Raises:
            FileNotFoundError: no such folder or file. ValueError: what the config or the weights lack, by name; a
            device that is not here.
        Cost: every shard is read once; peak memory is the model and one shard.
        """
        devices = devices_of(device, alone='towers="context"' * (towers == "context"))
        if dtype is not None:
            dtype_of(dtype)
        folder = ASSETS if path is None else Path(path)
        config = TwoTowerConfig.from_file(folder)
        dtype = dtype or config.dtype
        with torch.device("meta"):
            model = cls(replace(config, dtype=dtype), towers=towers)
        checkpoint.load(model, folder, device=devices, dtype=dtype, towers=towers, progress=progress)
        return model.requires_grad_(False)

    def generate(
        self,
        prompts: Tensor | Sequence[Sequence[int]] | Sequence[str] | str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        mode: str = "mask_diffusion",
        max_new_tokens: int = 128,
        block_size: int | None = None,
        steps_per_block: int = 16,
        draft_steps: int = 1,
        confidence_threshold: float | None = None,
        strategy: str = "schedule",
        confidence: str | None = None,
        factor: float = 1.0,
        entropy_bound: float = 0.1,
        tempered: bool = False,
        alg_temp: float = 0.0,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | str | None = "config",
        stop: str | Sequence[str] | None = None,
        logprobs: bool = False,
        seed: int | Sequence[int] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Generation:
        """Continue prompts.

        Args:
            prompts: [B, P] int64, or B lists of token ids of any lengths from 1; or a text, or a list of texts, which
                `tokenizer` encodes.
            messages: in place of prompts, a conversation for the folder's chat template: dicts with role and content.
            mode: "mask_diffusion" (denoiser, block by block), "ar" (context tower alone), "mock_ar" (denoiser, one
                token at a time) or "speculative" (what "ar" writes, several tokens a cycle: the denoiser drafts a
                block, the context tower reads it and keeps what it would have written itself).
            max_new_tokens: need not divide by the block size: the last block keeps its size, the output is cut.
            block_size: tokens denoised together; None: the size that the denoiser was trained with.
            steps_per_block: most denoiser passes for a block, of the strategies "schedule" and "static"; the others
                take at most one a position.
            draft_steps: in "speculative", most denoiser passes for a draft, in place of steps_per_block: by a schedule
                the last one takes all that is left.
            confidence_threshold: masked positions whose prediction is more probable than this are committed at once;
                None: what config.json says, 0.8 where it says nothing.
            strategy: which positions of a block commit in a pass: "schedule" (all above the threshold, and as many as
                finish the block in steps_per_block passes), "threshold" (all above it, or one), "static" (the
                schedule alone), "factor" (Fast-dLLM's) or "entropy_bound" (EB-Sampler's); docs/decoding.md has them.
            confidence: what orders positions and is held to the threshold: "probability" of the prediction, "margin",
                "entropy", "random" or "sequential". "entropy" is 0 or less, so no threshold or factor of 0 to 1 lets it
                pass: it orders what the schedule or the entropy bound takes. None: what config.json says, "probability"
                where it says nothing.
            factor, entropy_bound: of the strategies of these names.
            tempered: whether confidences are of the distribution that tokens are drawn from, after temperature, top_k
                and top_p, and in "mask_diffusion" logprobs with them; of no effect at temperature 0.
            alg_temp: Dream's: above 0, the order of positions is drawn, in proportion to exp(confidence / alg_temp).
            temperature: 0 takes the most probable token; 1e-30 and above, a Gumbel-max sample of logits / temperature,
                which at 1e30 and above draws every token alike.
            top_k, top_p: narrow what may be sampled at a temperature above 0.
            eos_token_id: one or several ids that end a row; None: nothing does; default: what config.json and
                generation_config.json say.
            stop: a text or several: a row ends where one is complete, in the middle of a block or not. Its text ends
                before it, its tokens with the one that completes it.
            logprobs: whether to return them.
            seed: an int s gives row b the seed s + b; or one per row; None: from torch's default generator. Seeds count
                modulo 2^64. A row's noise depends on its seed, position, denoising step and token id, not on its
                neighbours.
            on_step: called with a `Step` after every denoiser pass (every token, in the autoregressive modes). What it
                is given are copies.
        Returns:
            a list with a value for each row: `tokens`: new token ids; `text`; `finish_reason`: "eos", "stop" or
            "length"; `nfe`: denoiser passes; `cycles`: in "speculative", how often a draft was verified; `logprobs`:
            of the tokens, as predicted when they were committed, at temperature 1 (or `tempered`); -inf where fp32 has
            no such small probability.
        Raises:
            ValueError: a setting, prompt or token id that cannot be meant, before any work. Warns when block_size is
            above the trained one, and when a prompt holds the mask token.
        Cost: a prefill, then per block at most so many denoiser passes and one context pass; in the block in
            which a row ends, passes until its end and all before it are committed and tokens behind it could only be
            dropped (a last pass over one such position is made all the same: the published NFE counts it).
        Source: the published implementation's generation loop (arXiv 2606.26493), one row at a time there.
        """
        settings = Settings.of(
            self.config,
            mode=mode,
            max_new_tokens=max_new_tokens,
            block_size=block_size,
            steps_per_block=steps_per_block,
            draft_steps=draft_steps,
            confidence_threshold=confidence_threshold,
            strategy=strategy,
            confidence=confidence,
            factor=factor,
            entropy_bound=entropy_bound,
            tempered=tempered,
            alg_temp=alg_temp,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            stop=stop,
            logprobs=logprobs,
        )
        ids = self._prompts(prompts, messages)
        return generate(self, ids, settings, seed=seed, on_step=on_step, vocabulary=self._vocabulary)

    def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        seed: int | None = None,
        on_step: Callable[[Step], None] | None = None,
        **settings: Any,
    ) -> Stream:
        """The text that follows a prompt, piece by piece: as blocks are committed, in other modes as tokens come.

        Pieces joined are `generate`'s text; none ends in the middle of a character, and what may yet be a stop string
        waits. Whoever stops reading ends the generation. `result` is what `generate` would have returned, so far.

        Args:
            prompt:   a text, or token ids; messages, seed, on_step and the settings: as `generate` takes them.
        Raises: as `generate` does, before the first piece is asked for; ValueError without a tokenizer.

        Example:
            >>> for piece in TwoTower.from_pretrained().stream("def f(", max_new_tokens=32):
            ...     print(piece, end="", flush=True)
        """
        ids = prompt_ids(self, prompt, messages)
        s = Settings.of(self.config, **settings)
        return Stream(self, ids, s, self.tokenizer, seed=seed, on_step=on_step)

    def compile_passes(self) -> None:
        """Compile what generation makes again and again for a single row on a CPU: passes over a token or a block.

        By torch.compile, with a C++ compiler, when a pass of its length and kind is first made: once in a process, and
        faster where PyTorch's cache on disk has it. Results are those of other operations in another order: equal up to
        rounding. Passes of several rows, of other block sizes than the trained one and of prompts stay as they are.

        Raises:
            ValueError: the model is not on a CPU: a GPU replays graphs; torch.compile fails, as without a compiler.
        Cost: half a minute for each kind of pass: one in "ar", two in the other modes. docs/measurements.md has what it
            gives.

        Example:
            >>> model = TwoTower.from_pretrained(device="cpu")
            >>> model.compile_passes()
            >>> model.generate("# enum Color: red, green\n", mode="ar").text
        """
        if self.device.type != "cpu":
            raise ValueError(
                f"compile_passes: the model is on {self.device}, where passes are CUDA graphs; expected a CPU"
            )
        compiled.start(self.context_tower, self.denoiser_tower)

    def release(self) -> None:
        """Let go of the engine that `generate` and `stream` keep on a GPU, its graphs and its memory."""
        self.__dict__.pop(KEPT, None)

    def _prompts(self, prompts: Any, messages: Sequence[Mapping[str, str]] | None) -> Any:
        """Token ids of what may be text."""
        if (prompts is None) == (messages is None):
            raise ValueError("prompts, messages: expected one of them")
        if messages is not None or isinstance(prompts, str):
            return [prompt_ids(self, prompts, messages)]
        if isinstance(prompts, Sequence) and prompts and all(isinstance(text, str) for text in prompts):
            return [self.tokenizer.encode(text) for text in prompts]
        return prompts

    def _vocabulary(self) -> Vocabulary | None:
        return self.tokenizer if self.has_tokenizer else None
