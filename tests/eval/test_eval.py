"""What eval/ counts: a model's texts, matrix products of a pass, where Python text is cut, golden logits."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from eval import cpu, golden, held_out, syntax
from eval.models import random_model
from tt_kernels.runtime.launch import ON_CPU
from tt_model import TwoTower, TwoTowerConfig, checkpoint
from tt_model.modeling import compiled
from tt_model.training.data import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = TwoTowerConfig(
    vocab_size=300,
    hidden_size=32,
    pattern="ME*-",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    intermediate_size=48,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=24,
    block_size=8,
)

SOURCE = '''"""A module."""

import sys


def function_{0}(first, second):
    """Add the two, {0} times."""
    for _ in range({0}):
        first += second
    return first


@decorated
class Class{0}:
    def method(self):
        if self.value:
            return [function_{0}(1, 2), "text {0}"]
        else:
            return None
'''


# ---- the CPU comparison ----


def test_recorded_products_are_those_of_the_pass() -> None:
    model = random_model(replace(CONFIG, pattern="E*-"))
    _, recorder = cpu.denoiser(model, context=20, rounds=1)
    sums = 2 * 16 * CONFIG.num_experts_per_tok * CONFIG.hidden_size  # over the chosen experts: a product too
    attention = 4 * 16 * (20 + 16) * CONFIG.num_attention_heads * CONFIG.head_dim
    assert recorder.flops == cpu.needed_flops(model, 16) + sums + attention
    assert len({function.overloadpacket for function, *_ in recorder.calls} & set(cpu.PRODUCTS)) >= 2


@pytest.mark.parametrize("more", [[], ["--compile"]], ids=str)
def test_cpu_comparison_runs(
    more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(cpu, "MIDDLE", CONFIG)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # which would take minutes
    monkeypatch.setattr(compiled, "_compiled", lambda *key: compiled._layered)
    assert cpu.main(["--rounds", "1", "--threads", "1", "--prompt", "5", "--new", "3", "--context", "4", *more]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| ") and cpu.BY_COMPILER in line]
    assert [cpu.OURS in row for row in rows] == ([True, False, False, False] if more else [])
    assert "1 threads" in out and "| transformers, eager " in out and "(goal: 2)" in out
    with pytest.raises(SystemExit):
        cpu.main(["--rounds", "0"])


# ---- where Python text is cut ----


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("a = 1\nb = 2\nc", "b = 2\nc"),  # "c" may become more than a word: "class"
        ("a = 1\nb = 2\nc = 3", "c = 3"),
        ("a = 1\n# why\n\nb = 2\n", "b = 2\n"),
        ("def f():\n    x = 1\n\n    y = 2", None),
        ("if a:\n    b\nelse:\n    c\ntry:\n    d\nexcept E:\n    e\nfin", "try:\n    d\nexcept E:\n    e\nfin"),
        ("a = 1\n@d\ndef f():\n    pass\n", "@d\ndef f():\n    pass\n"),
        ("a = 1\n@d(\n'x')\n@e\nclass C:\n    pass\n", "@d(\n'x')\n@e\nclass C:\n    pass\n"),
        ("s = '''\nnot = here\n'''\nb = 2\n", "b = 2\n"),
        ('s = """\nnot = "here\n# """\nb = 2\n', "b = 2\n"),
        ("s = 'it\\'s' # don't\nb = 2\n", "b = 2\n"),
        ("a = [\n1,\nx\n]\nb = 2\n", "b = 2\n"),
        ("a = [\nx,\ny\n]\n", None),
        ("a = f(1\ndef g():\n    pass\n", "def g():\n    pass\n"),  # a bracket left open shows
        ("a = 1 + \\\nb\nc = 2\n", "c = 2\n"),
        ("s = 'left open\nb = 2\n", "b = 2\n"),
    ],
)
def test_last_cut(text: str, last: str | None) -> None:
    assert text[syntax.last_cut(text) :] == (text if last is None else last)


@pytest.mark.parametrize(
    ("completion", "ended", "expected"),
    [
        ("\n    return x\n\n\ndef g(", False, "parses"),
        ("\n    return x + )\n\n\ndef g(", False, "fails"),
        ("\n    return (x\n\n\ndef g(", False, "fails"),
        ("\n   return x\n\n\ndef g(", False, "fails"),  # indented as no line before
        ("\n    return x\n    y", False, "unfinished"),
        ("\n    return x\n", True, "parses"),
        ("\n    return [\n", True, "fails"),
        ("", True, "unfinished"),
        ("\n\n# nothing new\ndef g(", False, "unfinished"),  # the prompt's own statement does not count
    ],
)
def test_verdict(completion: str, ended: bool, expected: str) -> None:
    assert syntax.verdict("import os\n\ndef f(x):\n    x += 1", completion, ended) == expected


def test_the_standard_library_is_cut_where_its_statements_begin() -> None:
    for module in (json.decoder, json.encoder, json.scanner):
        text = Path(module.__file__).read_text()
        starts = syntax.statement_starts(text)
        assert starts[0] == 0 and len(starts) > 5
        for length in range(1, len(text), 97):
            cut = syntax.last_cut(text[:length])
            begun = [start for start in starts if start < length]
            assert cut in (begun[-1], *begun[-2:-1]) and syntax.parse(text[:cut]) is not None
            assert cut == begun[-1] or len(text[begun[-1] : length].split()) <= 1  # only its first word is there


# ---- what a model writes ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small files; which are held out depends on their names alone."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        (folder / f"file_{i}.py").write_text(SOURCE.format(i) + f"\n\nvalue_{i} = 1\n" * 40)
    return folder


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([path.read_text() for path in corpus.iterdir()], 300)
    tokenizer.save(str(folder / "tokenizer.json"))
    checkpoint.save(random_model(CONFIG), folder / "both", tokenizer=folder, progress=False)
    checkpoint.save(random_model(CONFIG, towers="context"), folder / "one", tokenizer=folder, progress=False)
    return folder


def test_prompts_are_whole_lines_and_shared_among_files(corpus: Path, folder: Path) -> None:
    texts = held_out.load_texts(str(corpus), "held_out")
    tokenizer = held_out.load_tokenizer(folder)
    size = dict(count=2 * len(texts), length=40, new_tokens=30, bos=1)
    prompts = held_out.cut_prompts(texts, tokenizer, **size)
    assert (
        prompts
        == held_out.cut_prompts(texts, tokenizer, **size)
        != held_out.cut_prompts(texts, tokenizer, **size, seed=1)
    )
    for prompt in prompts:
        (text,) = [t for t in texts if prompt.text in t] if "value" not in prompt.text else texts[:1]
        assert 20 <= len(prompt.ids) <= 40 and len(prompt.following) == 30
        assert (prompt.ids[0] == 1) == prompt.text.startswith('"""A module')
        assert tokenizer.decode(prompt.ids) == prompt.text == prompt.text.rstrip()
        if text.startswith(prompt.text):
            assert text[len(prompt.text)] == "\n"
            assert text.startswith(prompt.text + tokenizer.decode(prompt.following))
    with pytest.raises(ValueError, match="held-out files yield"):
        held_out.cut_prompts(texts, tokenizer, **{**size, "count": 10**6})


@torch.no_grad()
def test_bits_per_byte(folder: Path) -> None:
    model = random_model(CONFIG, towers="context")
    tokenizer = held_out.load_tokenizer(folder)
    texts = [SOURCE.format(7), "x = 1\n", "π = 3\n" * 20]
    done: list[float] = []
    rows = [[1, *tokenizer.encode(text).ids] for text in texts]
    size = sum(len(text.encode()) for text in texts)

    def expected(window: int) -> float:
        """Token by token: each predicted in the first window that has it in its second half, or in the first of all."""
        nats = 0.0
        for row in rows:
            for i in range(1, len(row)):
                begin = max(0, -(-(i - window) // (window // 2))) * (window // 2)
                logits = model.context_logits(torch.tensor([row[begin:i]]))[0, -1]
                nats += F.cross_entropy(logits, torch.tensor(row[i])).item()
        return nats / math.log(2) / size

    for window in (16, 4096):
        got = held_out.bits_per_byte(model, texts, tokenizer, window=window, bos=1, advance=done.append)
        assert got == pytest.approx(expected(window), rel=1e-5)
        assert sum(done) == pytest.approx(size)
        done.clear()


def test_agreement() -> None:
    share, prefix = held_out.agreement([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6, 7]])
    assert (share, prefix) == (5 / 6, 2)


@pytest.mark.parametrize("name", ["both", "one"])
def test_held_out_runs(name: str, corpus: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--prompts", "3", "--prompt-tokens", "24", "--new-tokens", "10", "--window", "64", "--batch", "2"]
    arguments = ["--model", str(folder / name), "--data", str(corpus), *size]
    assert held_out.main([*arguments, "--json", "--texts"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_byte"] > 0 and len(found["texts"]) == 3
    assert found["syntax"]["file"]["parsed"] == found["syntax"]["file"]["finished"]
    assert (
        ("tokens_per_pass" in found) == ("agreement" in found) == ("diffusion" in found["syntax"]) == (name == "both")
    )
    assert held_out.main(arguments) == 0
    assert "| bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--data", "no/such/corpus"], "no/such/corpus"),
        (["--prompts", "100000"], "held-out files yield"),
        (["--threshold", "2"], "confidence_threshold is 2"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, corpus: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--model", str(folder / "both"), "--data", str(corpus), "--prompts", "2", "--prompt-tokens", "24"]
    assert held_out.main([*base, *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1 and message in error[0]


def test_random_models_use_all_their_parts() -> None:
    model = random_model(CONFIG)
    ids = torch.randint(4, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    logits = model.context_logits(ids)
    assert 0.3 < logits.std() < 30 and isinstance(model, TwoTower)
    for name, parameter in model.context_tower.named_parameters():
        old = parameter.detach().clone()
        parameter.mul_(1.5).add_(0.01 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1)))
        changed = (model.context_logits(ids) - logits).abs().max()
        parameter.copy_(old)
        assert changed > 1e-4, name


# ---- golden models in 16 bits ----


def test_golden_error_is_a_median_over_tokens() -> None:
    want = [torch.ones(2, 3), torch.ones(3, 3)]
    got = [want[0] * 1.1, want[1].clone()]
    assert golden.error(got, want) == 0
    got[1][:2] *= 5
    assert golden.error(got, want) == pytest.approx(0.1)
    got[1][2, 2] = float("nan")
    assert golden.error(got, want) == float("inf")


@pytest.mark.skipif(ON_CPU, reason="bf16")
def test_golden_model_in_bf16(golden_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, (ours, theirs) in golden.compare(golden_dir / "small", "cpu").items():
        assert ours == theirs < 0.03, part  # on a CPU both are references
    assert golden.main([str(ROOT / "docs")]) == 2 and "no golden models" in capsys.readouterr().err
