"""The model's configuration: what config.json says, checked; every field is honoured or refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from .files import read_object

LAYER_KINDS = {"M": "Mamba-2", "*": "attention", "E": "mixture of experts", "-": "dense MLP"}
ACTIVATIONS = ("relu2", "silu")
CONFIDENCES = ("probability", "margin", "entropy", "random", "sequential")  # what says how sure a prediction is
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# What transformers calls the four kinds, newest name first; the second name is that of its earlier releases.
_BLOCK_TYPES = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
    "mlp": "-",
}
_PATTERN_LISTS = ("layers_block_type", "layer_types")
# Other spellings of a field, from transformers' `nemotron_h` and its predecessors.
_ALIASES = {
    "layer_norm_epsilon": ("norm_eps", "rms_norm_eps"),
    "n_groups": ("mamba_n_groups",),
    "conv_kernel": ("mamba_d_conv",),
    "use_conv_bias": ("mamba_conv_bias",),
    "chunk_size": ("mamba_chunk_size",),
    "time_step_limit": ("mamba_dt_limit",),
    "n_routed_experts": ("num_local_experts",),
    "dtype": ("torch_dtype",),
    "head_dim": ("attention_head_dim",),
}
_REQUIRED = ("vocab_size", "hidden_size")
# The sizes that a layer kind needs: required where the pattern has the letter, meaningless where it has not.
_SIZES = {
    "*": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    "M": ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"),
    "E": ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    "-": ("intermediate_size",),
}
_POSITIVE = (*_REQUIRED, "chunk_size", "n_group", "topk_group", "max_position_embeddings", "block_size")
# What a field may hold, by its annotation: types, and what they are called.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "an integer"),
    "int | None": ((int, NoneType), "an integer or null"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
}
_NULLABLE = {"bos_token_id", "eos_token_id", "pad_token_id"}
# Fields that would change the result and that this model has in one form only: (value, what is supported).
_ONLY = {
    "mamba_hidden_act": ("silu", "only silu is supported"),
    "tie_word_embeddings": (False, "only untied heads are supported"),
    "sliding_window": (None, "only attention over the whole context is supported"),
    "moe_latent_size": (None, "experts on a latent projection are not supported"),
    "quantization_config": (None, "quantised checkpoints are not supported"),
    "block_configs": (None, "layers of different sizes are not supported"),
}


def _refuse(field: str, value: object, why: str) -> ValueError:
    return ValueError(f"config: {field} is {value!r}: {why}")


def _is(value: object, *types: type) -> bool:
    """Whether a value is of one of the types; a truth value is no integer."""
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def _check_pattern(field: str, pattern: object) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise _refuse(field, pattern, "expected a string of one letter per layer")
    if unknown := next((letter for letter in pattern if letter not in LAYER_KINDS), None):
        known = ", ".join(f"{k} ({v})" for k, v in LAYER_KINDS.items())
        raise _refuse(field, pattern, f"{unknown!r} is not a layer kind: expected {known}")


def _special_float(value: object) -> object:
    """Infinity as transformers writes it, `{"__float__": "Infinity"}`; any other value as it is."""
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        return float(str(value["__float__"]))
    return value


@dataclass(frozen=True, kw_only=True)
class TwoTowerConfig:
    """Sizes and constants of both towers, which share one configuration.

    `pattern` has one letter per layer: M Mamba-2, * attention, E mixture of experts, - dense MLP. Sizes of kinds that
    the pattern lacks may be 0. Creating one (also with `dataclasses.replace`) checks it: ValueError names the field,
    its value and what is supported.
    """

    vocab_size: int
    hidden_size: int
    pattern: str
    # attention
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    attention_bias: bool = False
    # Mamba-2
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    ssm_state_size: int = 0
    n_groups: int = 0  # groups of heads that share B and C
    conv_kernel: int = 4
    chunk_size: int = 128  # of the published scan; the scans here choose their own, which is the same mathematics
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    use_bias: bool = False  # of in_proj and out_proj
    use_conv_bias: bool = True
    # dense MLP
    intermediate_size: int = 0
    mlp_bias: bool = False  # routed experts have none
    mlp_hidden_act: str = "relu2"  # dense MLP, routed and shared experts
    # mixture of experts
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0  # width of the shared expert; 0: there is none
    n_group: int = 1  # groups of experts that the router chooses among first
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    # all layers
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = False
    max_position_embeddings: int = 4096
    dtype: torch.dtype = torch.float32  # the towers compute in it; weights may be stored in a smaller one
    # tokens
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0
    mask_token_id: int = 3
    # the denoiser
    block_size: int = 16  # the one that it was trained with
    confidence_threshold: float = 0.8  # what generation takes where it is asked for nothing else, as is confidence
    confidence: str = "probability"
    time_embedding_size: int = 256

    def __post_init__(self) -> None:
        self._check_types()
        for name in _POSITIVE:
            self._need(getattr(self, name) >= 1, name, "it must be at least 1")
        for kind, names in _SIZES.items():
            for name in names:
                why = f"it must be at least 1 (the pattern has {LAYER_KINDS[kind]} layers)"
                self._need(getattr(self, name) >= (kind in self.pattern), name, why)
        self._check_values()

    def _need(self, fits: bool, field: str, why: str) -> None:
        """ValueError that names a field, its value and what is expected, unless it fits."""
        if not fits:
            raise _refuse(field, getattr(self, field), why)

    def _check_types(self) -> None:
        for field in fields(self):
            if str(field.type) in _TYPES:
                types, expected = _TYPES[str(field.type)]
                self._need(_is(getattr(self, field.name), *types), field.name, f"expected {expected}")
        _check_pattern("pattern", self.pattern)
        self._need(self.dtype in DTYPES.values(), "dtype", f"expected one of {', '.join(DTYPES)}")
        if isinstance(self.eos_token_id, list):  # what JSON has; frozen, so that a config stays hashable
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        ids = all(_is(e, int) for e in self.eos_token_ids)
        self._need(ids, "eos_token_id", "expected an integer, a list of integers or null")
        limit = self.time_step_limit
        two = isinstance(limit, list | tuple) and len(limit) == 2 and all(_is(v, int, float) for v in limit)
        self._need(two, "time_step_limit", "expected two numbers, smallest and largest")
        object.__setattr__(self, "time_step_limit", (float(limit[0]), float(limit[1])))

    def _check_values(self) -> None:
        need = self._need
        if "*" in self.pattern:
            why = f"it must be a multiple of num_key_value_heads ({self.num_key_value_heads})"
            need(self.num_attention_heads % self.num_key_value_heads == 0, "num_attention_heads", why)
        if "M" in self.pattern:
            why = f"it must be a multiple of n_groups ({self.n_groups})"
            need(self.mamba_num_heads % self.n_groups == 0, "mamba_num_heads", why)
        need(self.conv_kernel >= 2, "conv_kernel", "it must be at least 2")
        need(0 <= self.confidence_threshold <= 1, "confidence_threshold", "expected 0 to 1")
        need(self.confidence in CONFIDENCES, "confidence", f"expected one of {', '.join(CONFIDENCES)}")
        low, high = self.time_step_limit
        need(0 <= low <= high, "time_step_limit", "expected 0 <= smallest <= largest")
        need(self.mlp_hidden_act in ACTIVATIONS, "mlp_hidden_act", f"only {' and '.join(ACTIVATIONS)} are supported")
        if "E" in self.pattern:
            self._check_routing()
        need(0 < self.layer_norm_epsilon < math.inf, "layer_norm_epsilon", "it must be above 0")
        need(math.isfinite(self.routed_scaling_factor), "routed_scaling_factor", "it must be finite")
        size = self.time_embedding_size
        need(size >= 2 and size % 2 == 0, "time_embedding_size", "it must be even and at least 2")
        bos = () if self.bos_token_id is None else (self.bos_token_id,)
        special = {"mask_token_id": (self.mask_token_id,), "bos_token_id": bos, "eos_token_id": self.eos_token_ids}
        for name, ids in special.items():
            why = f"it is not in the vocabulary of {self.vocab_size} tokens"
            need(all(0 <= i < self.vocab_size for i in ids), name, why)

    def _check_routing(self) -> None:
        need, experts, groups = self._need, self.n_routed_experts, self.n_group
        need(not self.mlp_bias, "mlp_bias", "only experts without bias are supported")
        shared = "moe_shared_expert_intermediate_size"
        need(getattr(self, shared) >= 0, shared, "it must be 0 (no shared expert) or more")
        need(self.num_experts_per_tok <= experts, "num_experts_per_tok", f"there are only {experts} n_routed_experts")
        need(self.topk_group <= groups, "topk_group", f"there are only {groups} groups (n_group)")
        need(experts % groups == 0, "n_routed_experts", f"it must be a multiple of n_group ({groups})")
        why = "a group is scored by its best 2 experts, so it needs at least 2"
        need(groups == 1 or experts // groups >= 2, "n_group", why)

    @property
    def num_hidden_layers(self) -> int:
        """Layers of one tower."""
        return len(self.pattern)

    @property
    def d_inner(self) -> int:
        """Channels of a Mamba-2 mixer."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of its convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a sequence; empty when none does."""
        eos = self.eos_token_id
        return () if eos is None else eos if isinstance(eos, tuple) else (eos,)

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """The indices of the layers of a kind, a letter of the pattern; ValueError for an unknown letter."""
        if kind not in LAYER_KINDS:
            raise ValueError(f"layers_of: {kind!r} is not a layer kind: expected one of {' '.join(LAYER_KINDS)}")
        return tuple(i for i, letter in enumerate(self.pattern) if letter == kind)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TwoTowerConfig:
        """The configuration that a config.json spells out, as published or as transformers' `nemotron_h` writes it.

        What cannot change the result is ignored: `expand` (the mixer's width is heads x head size), rotary settings
        (there is no position encoding), dropout, initialisation, cache settings. A null is a missing value, except that
        a special token may be null: there is none.
        ValueError names a field that is missing, contradicts another or asks for what this model has not.
        """
        given = {k: _special_float(v) for k, v in values.items() if v is not None or k in _NULLABLE}
        kind = given.get("model_type", "nemotron_h")
        if not isinstance(kind, str) or not kind.startswith("nemotron_h"):
            raise _refuse("model_type", kind, "only nemotron_h is supported")
        for name, (only, why) in _ONLY.items():
            if name in given and given[name] != only:
                raise _refuse(name, given[name], why)
        read: dict[str, Any] = {"pattern": _pattern(given)}
        for field in fields(cls):
            names = [n for n in (field.name, *_ALIASES.get(field.name, ())) if n in given]
            if field.name == "pattern" or not names:
                continue
            read[field.name] = given[names[0]]
            for other in names[1:]:
                if given[other] != given[names[0]]:
                    raise _refuse(other, given[other], f"but {names[0]} is {given[names[0]]!r}: they must agree")
        if "num_key_value_heads" not in read and "num_attention_heads" in read:
            read["num_key_value_heads"] = read["num_attention_heads"]
        if given.get("mamba_proj_bias") and not read.get("use_bias"):
            raise _refuse("mamba_proj_bias", given["mamba_proj_bias"], "use_bias is what gives the projections a bias")
        if "E" in read["pattern"]:
            read["moe_shared_expert_intermediate_size"] = _shared_width(given)
        needed = [*_REQUIRED, *(n for kind, names in _SIZES.items() if kind in read["pattern"] for n in names)]
        if missing := [name for name in needed if name not in read]:
            raise ValueError(f"config: {', '.join(missing)} missing (the pattern is {read['pattern']!r})")
        if isinstance(limit := read.get("time_step_limit"), list):
            read["time_step_limit"] = tuple(_special_float(v) for v in limit)
        if "dtype" in read:  # one that is not known is refused as it is
            read["dtype"] = DTYPES.get(str(read["dtype"]).removeprefix("torch."), read["dtype"])
        return cls(**read)

    @classmethod
    def from_file(cls, path: str | Path) -> TwoTowerConfig:
        """`from_dict` of a config.json, given itself or by its folder.

        The end-of-sequence ids of a generation_config.json beside it are added to its own; of the other special tokens
        those that it lacks. FileNotFoundError when there is no config.json; ValueError, naming the file, for what is
        not JSON or not supported.
        """
        file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file (a model is a folder with config.json and its weights)")
        values, generation = read_object(file), file.with_name("generation_config.json")
        try:
            config = cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        given = read_object(generation) if file.name == "config.json" and generation.is_file() else {}
        try:
            return _with_generation(config, values, given)
        except ValueError as error:
            raise ValueError(f"{generation}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The published spelling of config.json, ready for `json.dump`; `from_dict` reads it back to an equal one.

        `mask_token_id` and what is the denoiser's alone, which the published file lacks, are extra keys.
        """
        values: dict[str, Any] = {
            "architectures": ["NemotronHTwoTowerForCausalLM"],
            "model_type": "nemotron_h",
            "hybrid_override_pattern": self.pattern,
            "num_hidden_layers": self.num_hidden_layers,
        }
        for field in fields(self):
            if field.name not in ("pattern", "dtype"):
                value = getattr(self, field.name)
                values[field.name] = list(value) if isinstance(value, tuple) else value
        dtype = str(self.dtype).removeprefix("torch.")
        # What the published file says of choices that this model has in one form only, or does not make at all.
        fixed = {"mamba_hidden_act": "silu", "tie_word_embeddings": False, "expand": 2}
        shared = int(self.moe_shared_expert_intermediate_size > 0)
        return {**values, "n_shared_experts": shared, **fixed, "torch_dtype": dtype}


def _with_generation(config: TwoTowerConfig, values: Mapping, generation: Mapping) -> TwoTowerConfig:
    """The config of config.json's `values` with the special tokens of generation_config.json."""
    chosen = {n: generation[n] for n in ("bos_token_id", "pad_token_id") if n not in values and n in generation}
    if generation.get("eos_token_id") is not None:
        more = replace(config, eos_token_id=generation["eos_token_id"])  # checks it
        ids = (*(config.eos_token_ids if "eos_token_id" in values else ()), *more.eos_token_ids)
        if (ids := tuple(dict.fromkeys(ids))) != config.eos_token_ids:
            chosen["eos_token_id"] = ids
    return replace(config, **chosen)


def _shared_width(given: Mapping[str, Any]) -> Any:
    """The width of the shared expert, 0 when there is none; ValueError when it is missing or there are several."""
    name = "moe_shared_expert_intermediate_size"
    count, width = given.get("n_shared_experts", 1), given.get(name)
    if isinstance(count, bool) or count not in (0, 1):
        why = "0 and 1 are supported: implementations disagree on the width of several"
        raise _refuse("n_shared_experts", count, why)
    if count and not width:
        raise _refuse(name, width, "the width of the shared expert is needed (n_shared_experts is 1)")
    return width if count else 0


def _pattern(given: Mapping[str, Any]) -> str:
    """The pattern from a string or a list of kinds; ValueError when there is none or they disagree."""
    found: dict[str, str] = {}
    if "hybrid_override_pattern" in given:
        pattern = given["hybrid_override_pattern"]
        _check_pattern("hybrid_override_pattern", pattern)
        found["hybrid_override_pattern"] = pattern
    for name in _PATTERN_LISTS:
        if name in given:
            kinds = given[name]
            if not isinstance(kinds, list | tuple) or not kinds or not all(isinstance(k, str) for k in kinds):
                raise _refuse(name, kinds, "expected a list of layer kinds")
            if unknown := next((k for k in kinds if k not in _BLOCK_TYPES), None):
                why = f"{unknown!r} is not a layer kind: expected {', '.join(_BLOCK_TYPES)}"
                raise _refuse(name, kinds if len(kinds) <= 8 else [*kinds[:8], "..."], why)
            found[name] = "".join(_BLOCK_TYPES[k] for k in kinds)
    if not found:
        names = ", ".join(("hybrid_override_pattern", *_PATTERN_LISTS))
        raise ValueError(f"config: no layer pattern: one of {names} is needed")
    (first, pattern), *others = found.items()
    for name, other in others:
        if other != pattern:
            raise _refuse(name, other, f"but {first} is {pattern!r}: they must agree")
    layers = given.get("num_hidden_layers", len(pattern))
    if layers != len(pattern):
        raise _refuse("num_hidden_layers", layers, f"but {first} has {len(pattern)} layers: they must agree")
    return pattern
