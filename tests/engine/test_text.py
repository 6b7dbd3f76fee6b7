"""Text in, text out: prompts as text, pieces as they come, stop strings, reasons, log-probabilities, conversations."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import prompts_of, random_model

from tt_model import TwoTower, TwoTowerConfig
from tt_model.two_tower import ASSETS
from tt_model.vocabulary import Vocabulary, Writing

MODES = ("mask_diffusion", "ar", "mock_ar", "speculative")
PROMPT = "def f(x):"
VOCABULARY = Vocabulary(ASSETS, TwoTowerConfig.from_file(ASSETS))


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return TwoTower.from_pretrained()


@pytest.mark.parametrize("mode", MODES)
def test_text_is_that_of_the_tokens(model: TwoTower, mode: str) -> None:
    options = dict(mode=mode, max_new_tokens=24, seed=1)
    ids = model.tokenizer.encode(PROMPT)
    want = model.generate([ids, ids[:3]], **options)
    got = model.generate([PROMPT, model.tokenizer.decode(ids[1:3])], **options)
    assert got == want and got.text == want.text
    assert got.text[0] == model.tokenizer.decode(got.tokens[0], ids)
    assert model.generate(PROMPT, **options).text == got.text[:1]


@pytest.mark.parametrize("mode", MODES)
def test_pieces_joined_are_the_text(model: TwoTower, mode: str) -> None:
    for more in ({}, dict(stop=["\n\n", "Return"]), dict(temperature=1.5, seed=3)):
        stream = model.stream(PROMPT, mode=mode, max_new_tokens=24, **more)
        pieces = list(stream)
        out = model.generate(PROMPT, mode=mode, max_new_tokens=24, **more)
        assert "".join(pieces) == out.text[0] and all(pieces)
        assert stream.result == out and stream.result.text == out.text
        assert len(pieces) > 1 or len(out.tokens[0]) <= 16


def test_a_stream_may_be_left(model: TwoTower) -> None:
    stream = model.stream(PROMPT, max_new_tokens=64)
    assert stream.result.tokens == [[]]
    assert stream.result.tokens[0] == [] and next(stream) == stream.result.text[0]
    assert len(stream.result.tokens[0]) == 16
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert model.generate(PROMPT, max_new_tokens=2).tokens[0]


def test_a_stop_string_cuts_wherever_it_lies(model: TwoTower) -> None:
    """Every part of the text as the stop string: across tokens and blocks, its text ends before it, its tokens with
    the one that completes it."""
    options = dict(mode="ar", max_new_tokens=30, eos_token_id=None)
    (text,), (tokens,) = (whole := model.generate(PROMPT, **options)).text, whole.tokens
    assert whole.finish_reason == ["length"]
    tried = 0
    for begin in range(0, len(text) - 12, 9):
        for length in (1, 4, 12):
            stop = text[begin : begin + length]
            out = model.generate(PROMPT, stop=["never there", stop], **options)
            assert out.text[0] == text[: text.index(stop)] and out.finish_reason == ["stop"]
            kept = out.tokens[0]
            assert kept == tokens[: len(kept)]
            decode = lambda ids: model.tokenizer.decode(ids, model.tokenizer.encode(PROMPT))
            assert stop in decode(kept) and stop not in decode(kept[:-1])
            tried += 1
    assert tried > 10
    block = model.generate(PROMPT, max_new_tokens=30, stop=stop, eos_token_id=None)
    assert stop not in block.text[0]


def test_rows_stop_by_themselves(model: TwoTower) -> None:
    prompts = [PROMPT, "import os\n", "class A:\n"]
    options = dict(max_new_tokens=24, seed=[3, 4, 5], temperature=0.6)
    for mode in MODES:
        together = model.generate(prompts, mode=mode, stop=["\n    ", "import"], **options)
        for b, prompt in enumerate(prompts):
            alone = model.generate(prompt, mode=mode, stop=["\n    ", "import"], **options | dict(seed=[3 + b]))
            assert (alone.text[0], alone.tokens[0], alone.finish_reason[0]) == (
                *(together.text[b], together.tokens[b], together.finish_reason[b]),
            )


def test_an_end_is_told_from_a_length(model: TwoTower) -> None:
    tokens = model.generate(PROMPT, mode="ar", max_new_tokens=12, eos_token_id=None).tokens[0]
    out = model.generate(PROMPT, mode="ar", max_new_tokens=12, eos_token_id=tokens[5])
    assert out.finish_reason == ["eos"] and out.tokens[0] == tokens[: tokens.index(tokens[5]) + 1]


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_logprobs_are_the_context_towers(mode: str) -> None:
    model, prompts = random_model(), prompts_of([3, 9, 20])
    options = dict(mode=mode, max_new_tokens=9, eos_token_id=None, temperature=0.7, seed=2)
    out = model.generate(prompts, logprobs=True, **options)
    assert model.generate(prompts, **options).logprobs == []
    for prompt, tokens, logs in zip(prompts, out.tokens, out.logprobs, strict=True):
        logits = model.context_logits(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        want = logits.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(logs, dtype=want.dtype), want)


def test_logprobs_of_a_block_are_those_of_the_committing_passes() -> None:
    model, (prompt,) = random_model(), prompts_of([9])
    seen: dict[int, float] = {}

    def note(step) -> None:
        for i in step.committed[0].nonzero().flatten().tolist():
            seen[step.start[0] - len(prompt) + i] = float(step.confidence[0, i].log())

    out = model.generate([prompt], max_new_tokens=20, eos_token_id=None, logprobs=True, on_step=note)
    assert out.logprobs[0] == [seen[i] for i in range(20)]


# ---- characters ----


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), st.text(max_size=40), st.data())
def test_text_as_it_comes_is_the_text(before: str, text: str, data: st.DataObject) -> None:
    vocabulary = VOCABULARY
    start, ids = vocabulary.encode(before), vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    writing, shown, at = Writing(vocabulary, start), "", 0
    while at < len(ids):
        count = data.draw(st.integers(1, 5))
        assert writing.push(ids[at : at + count]) is None
        assert writing.text.startswith(shown) and text.startswith(writing.text)
        writing.whole()  # changes nothing
        shown, at = writing.text, at + count
    assert writing.whole() == text == vocabulary.decode(ids, start)


@settings(max_examples=60, deadline=None)
@given(st.text("ab€", max_size=30), st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3))
def test_what_may_be_a_stop_string_waits(text: str, stop: list[str]) -> None:
    ids = VOCABULARY.tokenizer.encode(text, add_special_tokens=False).ids
    writing = Writing(VOCABULARY, [], stop)
    found = None
    for token in ids:
        assert not any(s in writing.text for s in stop)
        if (found := writing.push([token])) is not None:
            break
        writing.whole()  # changes nothing
    first = min((at for s in stop if (at := text.find(s)) >= 0), default=None)
    assert (found is None) == (first is None)
    final = writing.whole()
    assert not any(s in final for s in stop) and text.startswith(final)
    assert first is not None or final == text


# ---- conversations ----

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "# {{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}# assistant:{% endif %}"
)


@pytest.fixture
def chatting(tmp_path: Path) -> TwoTower:
    folder = tmp_path / "chat"
    shutil.copytree(ASSETS, folder)
    convention = dict(add_bos_token=False, bos_token="<bos>", chat_template=TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(convention))
    return TwoTower.from_pretrained(folder)


def test_a_conversation_is_read_by_the_folders_template(chatting: TwoTower, model: TwoTower) -> None:
    messages = [dict(role="user", content="hi <bos>"), dict(role="assistant", content="ho")]
    ids = chatting.tokenizer.chat(messages)
    assert ids == chatting.tokenizer.encode("<bos># user: hi <bos>\n# assistant: ho\n# assistant:", special=True)
    assert ids[0] == chatting.config.bos_token_id and ids.count(ids[0]) == 2
    assert chatting.generate(messages=messages, max_new_tokens=4) == chatting.generate([ids], max_new_tokens=4)
    assert "".join(chatting.stream(messages=messages, max_new_tokens=8))
    with pytest.raises(ValueError, match="refuses them: no tools"):
        chatting.tokenizer.chat([dict(role="tool", content="x")])
    for bad in ([], ["hi"], [dict(role="user")]):
        with pytest.raises(ValueError, match="expected dicts with role and content"):
            chatting.tokenizer.chat(bad)
    with pytest.raises(ValueError, match="has no chat template"):
        model.generate(messages=messages)


# ---- bad input ----


def test_bad_input_is_named(model: TwoTower) -> None:
    for bad, words in (
        (dict(stop=[""]), "stop holds ''"),
        (dict(stop=[3]), "stop holds 3"),
        (dict(stop=b"x"), "expected a text or several"),
        (dict(logprobs=2), "logprobs is 2"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(PROMPT, **bad)
        with pytest.raises(ValueError, match=words):
            model.stream(PROMPT, **bad)  # before the first piece is asked for
    with pytest.raises(ValueError, match="expected one of them"):
        model.generate()
    with pytest.raises(ValueError, match="expected one of them"):
        model.generate(PROMPT, messages=[])
    with pytest.raises(ValueError, match="expected one text"):
        model.stream([[4, 5]])
    with pytest.raises(TypeError, match="hurry"):
        model.stream(PROMPT, hurry=True)
    bare = random_model()
    with pytest.raises(ValueError, match="no tokenizer"):
        bare.generate([[4]], stop="x")
    with pytest.raises(ValueError, match="not loaded from a folder"):
        bare.generate("x")
    out = bare.generate([[4]], max_new_tokens=2)
    with pytest.raises(ValueError, match="no tokenizer"):
        out.text  # noqa: B018
