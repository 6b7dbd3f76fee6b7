"""Attention by name: every mask that is served, against transformers' own with its own mask; the rest is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity import KERNELS
from tiny import IDS, PADDED, Wide, error, tiny

pytest.importorskip("transformers", minversion="5.20")

from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention

from tt_kernels.integrations import transformers as tt
from tt_kernels.integrations.transformers.attention import attention_forward, mask

BOUND = 1e-12  # fp64 on both sides; one layer
SLIDING = masking_utils.sliding_window_causal_mask_function(3)
CAUSAL, FULL = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
# Rows of queries, keys, mask function, and the mask of the keys, by row.
NONE, LEFT = None, ["0001111", "1111111", "0111111"]
CASES = {
    "causal": (7, 7, CAUSAL, NONE),
    "causal, padding before": (7, 7, CAUSAL, LEFT),
    "causal, padding on both sides": (7, 7, CAUSAL, ["0011110", "1110000", "1111111"]),
    "one token on a cache": (1, 7, CAUSAL, NONE),
    "one token on a cache, padding before": (1, 7, CAUSAL, LEFT),
    "three tokens on a cache": (3, 7, CAUSAL, NONE),
    "three tokens on a cache, padding before": (3, 7, CAUSAL, LEFT),
    "a row that begins now": (3, 7, CAUSAL, ["0000111", "1111111", "0111111"]),
    "full": (7, 7, FULL, NONE),
    "full, padding before and behind": (7, 7, FULL, ["0001111", "1111100", "0111110"]),
    "full, a row of little": (7, 7, FULL, ["0001000", "1111111", "0111110"]),
    "other tokens' keys": (4, 7, FULL, NONE),
    "fewer keys": (7, 4, FULL, NONE),
    "one token to others, padding on both sides": (1, 7, FULL, ["0001111", "1111100", "0111110"]),
    "other tokens' keys, padding on both sides": (5, 7, FULL, ["0001111", "1111100", "0111110"]),
    "more tokens than keys, padding behind": (9, 7, FULL, ["1111111", "1111100", "1100000"]),
    "a single token": (1, 1, CAUSAL, NONE),
}
# Rows of queries, keys, window, the mask of all tokens by row, and the first tokens that the cache has dropped.
WINDOWS = {
    "a window": (7, 7, 3, NONE, 0),
    "a window of one": (7, 7, 1, NONE, 0),
    "a window that holds all": (7, 7, 7, NONE, 0),
    "a window, padding on both sides": (7, 7, 3, ["0011110", "1110000", "1111111"], 0),
    "one token on a cache that keeps all": (1, 7, 3, NONE, 0),
    "one token on a cache of a window": (1, 4, 4, ["0001111", "1111111", "0000111"], 3),
    "three tokens on a cache that keeps all": (3, 7, 2, LEFT, 0),
    "three tokens on a cache of a window": (3, 6, 4, ["000011111", "111111111", "000000111"], 3),
    "more tokens than the window": (5, 6, 2, ["0000111111", "1111111111", "0000011111"], 4),
}


def tensors(q: int, kv: int, layout: str) -> list[torch.Tensor]:
    """query [3, 4, q, 8], key and value [3, 2, kv, 8], as a projection, a cache or a longer buffer has them."""
    g = torch.Generator().manual_seed(q + kv)
    make = lambda heads, length: torch.randn(3, heads, length, 8, dtype=torch.float64, generator=g)
    made = [make(4, q), make(2, kv), make(2, kv)]
    if layout == "projection":
        return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in made]
    if layout == "odd rows":
        return [torch.cat([t.flatten(1), t.flatten(1)[:, :1]], 1)[:, :-1].view(t.shape) for t in made]
    return made


def both(name: str, layout: str, grad: bool) -> None:
    q, kv, function, rows = CASES[name]
    padding = None if rows is None else torch.tensor([[c == "1" for c in row] for row in rows])
    offset = kv - q if function is CAUSAL else 0
    given: dict[str, Any] = dict(
        batch_size=3, q_length=q, kv_length=kv, q_offset=offset, mask_function=function, attention_mask=padding
    )
    module = SimpleNamespace(is_causal=function is CAUSAL, num_key_value_groups=2, training=False)
    theirs = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
    found = [t.requires_grad_(grad) for t in tensors(q, kv, layout)]
    expected = [t.detach().clone().requires_grad_(grad) for t in found]
    seen = slice(None) if padding is None or function is FULL else padding[:, kv - q :]  # full: padding sees, too
    y = attention_forward(module, *found, mask(**given), scaling=0.3)[0][seen]
    right = sdpa_attention_forward(module, *expected, theirs, scaling=0.3)[0][seen]
    assert error(y, right) < BOUND
    if grad:
        for out in (y, right):
            out.square().sum().backward()
        for got, wanted in zip(found, expected, strict=True):
            assert error(got.grad, wanted.grad) < BOUND


@pytest.mark.kernels
@pytest.mark.parametrize("name", CASES)
def test_values(name: str) -> None:
    both(name, "cache", grad=False)


@pytest.mark.parametrize("layout", ["projection", "odd rows"])
@pytest.mark.parametrize("name", CASES)
def test_layouts_and_gradients(name: str, layout: str) -> None:
    both(name, layout, grad=True)


@pytest.mark.kernels
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name: str, softcap: float | None) -> None:
    """Values and, without kernels, gradients, against transformers' eager attention under its own mask."""
    q, kv, window, rows, dropped = WINDOWS[name]
    padding = None if rows is None else torch.tensor([[c == "1" for c in row] for row in rows])
    sliding = masking_utils.sliding_window_causal_mask_function(window)
    made: dict[str, Any] = dict(batch_size=3, q_length=q, kv_length=kv, q_offset=dropped + kv - q, kv_offset=dropped)
    made |= dict(mask_function=sliding, attention_mask=padding, local_size=window)
    theirs = masking_utils.sdpa_mask(**made, allow_is_causal_skip=False)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)
    found = [t.requires_grad_(not KERNELS) for t in tensors(q, kv, "cache")]
    expected = [t.detach().clone().requires_grad_() for t in found]
    seen = slice(None) if padding is None else padding[:, -q:]
    y = attention_forward(module, *found, mask(**made), scaling=0.3, sliding_window=window, softcap=softcap)[0][seen]
    unseen = torch.zeros(theirs.shape, dtype=torch.float64).masked_fill(~theirs, -1e300)
    with Wide():
        right = gemma2_attention(module, *expected, unseen, scaling=0.3, softcap=softcap)[0][seen]
    assert error(y, right) < BOUND
    if not KERNELS:
        for out in (y, right):
            out.square().sum().backward()
        # Together: in a window of one those of queries and keys are 0.
        got, wanted = (torch.cat([t.grad.flatten() for t in tensors]) for tensors in (found, expected))
        assert error(got, wanted) < BOUND


@pytest.mark.parametrize(("q", "kv", "function"), [(7, 7, CAUSAL), (1, 7, CAUSAL), (3, 7, CAUSAL), (7, 7, FULL)])
def test_soft_caps(q: int, kv: int, function: Any) -> None:
    module = SimpleNamespace(is_causal=function is CAUSAL, num_key_value_groups=2, training=False)
    given = dict(batch_size=3, q_length=q, kv_length=kv, q_offset=kv - q, mask_function=function)
    theirs = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    y, _ = attention_forward(module, *tensors(q, kv, "cache"), mask(**given), scaling=0.3, softcap=0.5)
    unseen = torch.zeros(theirs.shape, dtype=torch.float64).masked_fill(~theirs, -1e300)
    with Wide():
        right, _ = gemma2_attention(module, *tensors(q, kv, "cache"), unseen, scaling=0.3, softcap=0.5)
    assert error(y, right) < BOUND


def test_nothing_is_copied() -> None:
    from tt_kernels.integrations.transformers.attention import _as_pages

    k, v = torch.randn(2, 3, 2, 7, 8).transpose(2, 3)
    starts = torch.tensor([3, 0, 1], dtype=torch.int32)
    pages, table = _as_pages(k[:, :6], v[:, :6], starts)
    assert pages[0].data_ptr() == k.data_ptr() and pages[1].data_ptr() == v.data_ptr()
    assert torch.equal(pages[0][table[0, 2], 0], k[0, 5]) and torch.equal(pages[1][table[2, 1], 0], v[2, 2])


def attend(attention_mask: torch.Tensor | None = None, **options: Any) -> None:
    module = SimpleNamespace(is_causal=options.pop("causal", True), num_key_value_groups=2)
    q, kv = options.pop("lengths", (7, 7))
    attention_forward(module, *tensors(q, kv, "cache"), attention_mask, **options)


def masked(rows: list[str] | None = None, **options: Any) -> Any:
    padding = None if rows is None else torch.tensor([[c == "1" for c in row] for row in rows])
    given = dict(batch_size=3, q_length=7, kv_length=7, mask_function=CAUSAL, attention_mask=padding)
    return mask(**(given | options))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: attend(dropout=0.1), "dropout is 0.1"),
        (lambda: attend(sliding_window=4), "sliding_window is 4, and the mask is of attention to all 7 tokens"),
        (lambda: attend(torch.zeros(3, 1, dtype=torch.int32)), "the layer names no sliding_window"),
        (lambda: attend(torch.zeros(3, 1, dtype=torch.int32), sliding_window=7), "no sliding_window or another"),
        (lambda: attend(s_aux=torch.zeros(4)), "s_aux is given, and not served: attention sinks"),
        (lambda: attend(sinks=torch.zeros(4)), "sinks is given, and not served: attention sinks"),
        (
            lambda: attend(indices=torch.zeros(3, 7, 2)),
            "indices is given, and not served: keys that an indexer chooses",
        ),
        (lambda: attend(block_indices=torch.zeros(3, 7)), "block_indices is given, and not served: keys"),
        (lambda: attend(output_attentions=True), "output_attentions is given"),
        (lambda: attend(torch.zeros(3, 1, 7, 7)), r"a mask \[3, 1, 7, 7\] of torch.float32"),
        (lambda: attend(torch.ones(3, 1, 7, 7, dtype=torch.bool)), r"of torch\.bool"),
        (lambda: attend(torch.ones(3, 7, dtype=torch.int32)), r"a mask \[3, 7\] of torch\.int32"),
        (lambda: attend(lengths=(7, 3)), "causal attention of 7 queries to 3 keys"),
        (lambda: masked(local_size=3), "neither causal, in a sliding window or not, nor full"),
        (lambda: masked(mask_function=SLIDING, local_size=4), "neither causal"),
        (lambda: masked(mask_function=masking_utils.or_masks(SLIDING, FULL), local_size=3), "neither causal"),
        (lambda: masked(mask_function=masking_utils.and_masks(SLIDING, FULL), local_size=3), "neither causal"),
        (
            lambda: masked(mask_function=masking_utils.sliding_window_bidirectional_mask_function(3), local_size=3),
            "a window to both sides",
        ),
        (
            lambda: masked(
                mask_function=masking_utils.chunked_causal_mask_function(3, torch.zeros(3).int()), local_size=3
            ),
            "chunks",
        ),
        (lambda: attend(masked(kv_offset=2, q_offset=2)), "dropped its first tokens"),
        (
            lambda: attend(masked(mask_function=SLIDING, kv_offset=2, q_offset=2, local_size=3)),
            "dropped its first tokens",
        ),
        (lambda: masked(mask_function=SLIDING, kv_length=9, local_size=3), "a static one"),
        (lambda: masked(kv_length=9), "a static one"),
        (lambda: masked(q_offset=torch.tensor(0)), "a static one"),
        (lambda: masked(["1101111"] * 3), "padding between tokens"),
        (lambda: masked(["0000011"] * 3, q_length=3, q_offset=4), "padding behind cached tokens"),
        (lambda: masked(["1111110"] * 3, q_length=1, q_offset=6), "padding behind cached tokens"),
        (lambda: masked(mask_function=FULL, q_length=3, q_offset=4), "full attention on a cache"),
    ],
)
def test_refusals(call: Any, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        call()


def test_no_gradients_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [t.requires_grad_() for t in tensors(7, 7, "cache")]
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    with pytest.raises(NotImplementedError, match="train with 'sdpa'"):
        attention_forward(SimpleNamespace(is_causal=True), *given, None)


@torch.no_grad()
def test_packed_rows_and_static_caches_are_refused_by_a_model() -> None:
    tt.register()
    model = tiny("mixtral")
    model.set_attn_implementation(tt.NAME)
    with pytest.raises(NotImplementedError, match="packed sequences"), Wide():
        model(IDS[:, :6], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
    with pytest.raises(NotImplementedError, match="a static one"), Wide():
        model.generate(IDS, attention_mask=PADDED, max_new_tokens=2, cache_implementation="static")
    model = tiny("mistral")
    model.set_attn_implementation(tt.NAME)
    with pytest.raises(NotImplementedError, match="packed sequences"), Wide():
        model(IDS[:, :6], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(7, 7), (7, 4), (4, 7)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_encoder_and_a_decoder(side: str, lengths: tuple[int, int]) -> None:
    """The decoder's tokens see the encoder's but for its padding, also where there are as many of them."""
    from transformers import BartConfig, BartModel

    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    config = BartConfig(vocab_size=61, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes)
    torch.manual_seed(0)
    model = BartModel(config).double().eval()
    ids = torch.randint(4, 61, (2, lengths[0]), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(ids)
    padding[0, slice(0, 2) if side == "left" else slice(-2, None)] = 0
    given = dict(input_ids=ids, attention_mask=padding, decoder_input_ids=ids.flip(1)[:, :1].expand(2, lengths[1]))
    plain = model(**given).last_hidden_state
    tt.register()
    model.set_attn_implementation(tt.NAME)
    assert error(model(**given).last_hidden_state, plain) < 1e-11


def test_a_layer_between_padding_looks_at_no_value() -> None:
    """On meta there is none: the mask, made once a pass, says by its shape what a layer needs to know."""
    q, k, v = (t.to("meta") for t in tensors(5, 7, "cache"))
    made = masked(["0001111", "1111100", "0111110"], mask_function=FULL, q_length=5)
    assert made.shape == (3, 2, 4)
    spans = torch.empty(3, 2, 1, dtype=torch.int32, device="meta").expand(made.shape)
    module = SimpleNamespace(is_causal=False)
    assert attention_forward(module, q, k, v, spans)[0].shape == (3, 5, 4, 8)
    assert attention_forward(module, q, k, v, None)[0].shape == (3, 5, 4, 8)
