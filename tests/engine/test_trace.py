"""The trace of a generation: what is recorded, the figures, text that is safe in a page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from models import CONFIG, prompts_of, random_model

from tt_model import TwoTower, TwoTowerConfig
from tt_model.engine.settings import Generation, Settings, Step
from tt_model.engine.trace import TEMPLATE, Trace, script_json
from tt_model.two_tower import ASSETS
from tt_model.vocabulary import Vocabulary

MODES = ("mask_diffusion", "ar", "mock_ar", "speculative")
VOCABULARY = Vocabulary(ASSETS, TwoTowerConfig.from_file(ASSETS))
MASK = 3
RULES = ("steps_per_block", "confidence_threshold", "strategy", "confidence", "factor", "entropy_bound", "tempered")
RULES += ("alg_temp",)
TEXT, PLACE, IDS, AT, SURE, SEEN, KIND = range(7)  # of a cell


class Scripts(HTMLParser):
    """What an HTML reader takes for scripts, and which files a page asks for."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.asked: list[str] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.inside = tag == "script"
        self.found += [""] * self.inside
        self.asked += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1] += data


def data_of(page: str) -> dict:
    scripts = Scripts(page)
    assert len(scripts.found) == 2 and scripts.asked == []
    return json.loads(scripts.found[0])


def step_of(start: int, step: int, ids: list[int], sure: list[float], taken: list[int]) -> Step:
    """Of one row: after a pass its tokens, MASK where it has none."""
    committed = torch.tensor([[i in taken for i in range(len(ids))]])
    return Step([0], [start], step, torch.tensor([ids]), torch.tensor([sure]), committed)


def traced(*steps: Step) -> Trace:
    trace = Trace()
    for step in steps:
        trace(step)
    return trace


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return random_model()


# ---- what is recorded ----


@pytest.mark.parametrize("mode", MODES)
def test_the_page_replays_every_step(model: TwoTower, mode: str) -> None:
    """Boxes as they are after every pass hold what `Step` said; at the end, the tokens."""
    steps: list[Step] = []
    trace = Trace()
    both = lambda step: (steps.append(step), trace(step))
    prompts = prompts_of([5, 9, 2])
    options = dict(mode=mode, max_new_tokens=21, confidence_threshold=0.3, temperature=0.8, seed=4, eos_token_id=7)
    out = model.generate(prompts, on_step=both, **options)
    data = data_of(trace.page(out, prompts, None, {"mode": mode}))
    assert data["mode"] == mode and len(data["rows"]) == 3
    for b, row in enumerate(data["rows"]):
        mine = [(s, s.rows.index(b)) for s in steps if b in s.rows]
        kept = [cell for cell in row["cells"] if cell[KIND] == ""]
        assert [token for cell in kept for token in cell[IDS]] == out.tokens[b]
        assert "".join(cell[TEXT] for cell in kept) == "".join(f"{token} " for token in out.tokens[b])
        assert [cell[PLACE] for cell in row["cells"]] == list(range(len(row["cells"])))
        assert len(row["passes"]) == len(mine) == len(row["lines"]) - 1
        if mode in ("mask_diffusion", "mock_ar"):
            assert len(mine) == out.nfe[b]
        for n, ((s, r), p) in enumerate(zip(mine, row["passes"], strict=True), 1):
            begin = s.start[r] - len(prompts[b])
            assert p["start"] == begin
            ids, sure = s.tokens[r].tolist(), s.confidence[r].tolist()
            assert p["confidence"] == [round(1000 * c) for c in sure]
            for i, cell in enumerate(row["cells"][begin : begin + len(ids)]):
                is_taken = 0 < cell[AT] <= n
                assert is_taken == (ids[i] != CONFIG.mask_token_id or mode in ("ar", "mock_ar"))
                assert cell[SEEN] < n
                if s.committed[r, i]:
                    assert (cell[AT], cell[IDS], cell[SURE]) == (n, [ids[i]], p["confidence"][i])
        assert row["lines"][-1].endswith(f"{len(out.tokens[b])} of {len(out.tokens[b])} tokens written")
        assert row["figures"]["tokens"] == str(len(out.tokens[b]))
        assert row["figures"]["ended by"] == {"eos": "end token", "length": "length"}[out.finish_reason[b]]


def test_a_box_is_seen_from_the_pass_before_its_first() -> None:
    """What a pass is about to fill is there before it: at the beginning, the first block."""
    trace = traced(
        step_of(5, 0, [9, MASK], [0.9, 0.2], [0]),
        step_of(5, 1, [9, 8], [0.0, 0.7], [1]),
        step_of(7, 0, [6, 5], [0.8, 0.8], [0, 1]),
    )
    data = data_of(trace.page(Generation([[9, 8, 6, 5]], [3], [], ["length"], forwards=[5]), [[1] * 5]))
    assert [cell[SEEN] for cell in data["rows"][0]["cells"]] == [0, 0, 2, 2]
    assert [cell[AT] for cell in data["rows"][0]["cells"]] == [1, 2, 3, 3]


# ---- figures ----


def test_figures_of_blocks() -> None:
    trace = traced(
        step_of(5, 0, [9, MASK, 8], [0.9, 0.2, 0.95], [0, 2]),
        step_of(5, 1, [9, 7, 8], [0.0, 0.7, 0.0], [1]),
        step_of(8, 0, [6, 2, MASK], [0.8, 0.8, 0.1], [0, 1]),
    )
    row = data_of(trace.page(Generation([[9, 7, 8, 6, 2]], [3], [], ["eos"], forwards=[5]), [[1] * 5]))["rows"][0]
    assert row["figures"] == {
        "tokens": "5",
        "denoiser passes": "3",
        "tokens per denoiser pass": "1.67",
        "passes of both towers": "5",  # the prompt's, and one over the first block
        "tokens per pass of both": "1.00",
        "blocks": "2",
        "ended by": "end token",
    }
    assert row["lines"] == [
        "before the first",
        "block 1, pass 1 of 2: 2 tokens taken, 1 masked; 2 of 5 tokens written",
        "block 1, pass 2 of 2: 1 token taken, 0 masked; 3 of 5 tokens written",
        "block 2, pass 1 of 1: 2 tokens taken, 1 masked; 5 of 5 tokens written",
    ]
    assert [(p["block"], p["mean"], p["share"]) for p in row["passes"]] == [
        (0, 925, 1000),
        (0, 700, 500),
        (1, 800, 1000),
    ]
    assert [cell[KIND] for cell in row["cells"]] == ["", "", "", "", "", "open"]


def test_figures_of_cycles() -> None:
    """A draft's first token is certain; those that the context tower would not have written come again."""
    trace = traced(
        step_of(5, 0, [9, 8, MASK, MASK], [0.9, 0.5, 0.0, 0.0], [0, 1]),
        step_of(7, 0, [7, 6, 5, MASK], [0.9, 0.5, 0.4, 0.0], [0, 1, 2]),
    )
    out = Generation([[9, 8, 7, 6]], [4], [2], ["length"], forwards=[7])
    data = data_of(trace.page(out, [[1] * 5], None, {"mode": "speculative", "draft_steps": 2, "steps_per_block": 16}))
    row = data["rows"][0]
    assert row["figures"] == {
        "tokens": "4",
        "denoiser passes": "4",
        "tokens per denoiser pass": "1.00",
        "passes of both towers": "7",  # the prompt's, and one over each draft
        "tokens per pass of both": "0.57",
        "cycles": "2",
        "drafted tokens accepted": "3 of 6",
        "ended by": "length",
    }
    assert row["lines"][1:] == [
        "1 of 3 drafted tokens accepted; 2 of 4 tokens written",
        "2 of 3 drafted tokens accepted; 4 of 4 tokens written",
    ]
    assert [cell[AT] for cell in row["cells"]] == [1, 1, 2, 2, 2, 0]
    assert [cell[KIND] for cell in row["cells"]] == ["", "", "", "", "dropped", "open"]
    assert (data["unit"], data["settings"]) == ("Cycle", ["draft steps 2"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, ["steps per block 16", "confidence threshold 0.8"]),
        (dict(strategy="threshold"), ["confidence threshold 0.8", "strategy threshold"]),
        (dict(strategy="static", confidence="margin"), ["steps per block 16", "strategy static", "confidence margin"]),
        (dict(strategy="factor", factor=0.5), ["strategy factor", "factor 0.5"]),
        (
            dict(strategy="entropy_bound", tempered=True),
            ["strategy entropy_bound", "entropy bound 0.1", "tempered True"],
        ),
        (dict(strategy="factor", alg_temp=0.3), ["strategy factor", "factor 1.0", "alg temp 0.3"]),
        (dict(strategy="factor", mode="ar"), []),
    ],
)
def test_a_page_names_the_rule_and_the_settings_that_it_follows(given: dict, said: list[str]) -> None:
    rules = {name: vars(Settings())[name] for name in RULES}
    page = traced(step_of(5, 0, [9], [0.25], [0])).page(
        Generation([[9]], [1], forwards=[2]), ["#"], None, rules | given
    )
    assert data_of(page)["settings"] == said


def test_figures_of_tokens() -> None:
    trace = traced(*(step_of(5 + i, 0, [9], [0.25], [0]) for i in range(3)))
    out = Generation([[9] * 3], [0], [], ["length"], forwards=[3])
    row = data_of(trace.page(out, [[1] * 5], None, {"mode": "ar"}))["rows"][0]
    assert row["figures"] == {
        "tokens": "3",
        "passes of both towers": "3",
        "tokens per pass of both": "1.00",
        "ended by": "length",
    }
    assert row["lines"][3] == "probability 0.250; 3 of 3 tokens written"
    mock = Generation([[9] * 3], [3], [], ["length"], forwards=[7])
    figures = data_of(trace.page(mock, [[1] * 5], None, {"mode": "mock_ar"}))["rows"][0]["figures"]
    assert (figures["tokens per denoiser pass"], figures["tokens per pass of both"]) == ("1.00", "0.43")


def test_nothing_generated() -> None:
    (row,) = data_of(Trace().page(Generation([[]], [0], [], ["length"], forwards=[0]), ["x"]))["rows"]
    assert (row["cells"], row["passes"], row["lines"]) == ([], [], ["before the first"])
    assert row["figures"]["tokens per denoiser pass"] == row["figures"]["tokens per pass of both"] == "–"


# ---- texts ----


def test_a_character_of_several_tokens_is_one_box() -> None:
    ids = VOCABULARY.tokenizer.encode("a🙂", add_special_tokens=False).ids
    assert len(ids) > 2
    half = [*ids[:2], *[MASK] * (len(ids) - 2)]
    trace = traced(
        step_of(4, 0, half, [0.9, 0.8, *[0.3] * (len(ids) - 2)], [0, 1]),
        step_of(4, 1, ids, [0.0, 0.0, *[0.6] * (len(ids) - 2)], list(range(2, len(ids)))),
    )
    (row,) = data_of(trace.page(Generation([ids], [2], forwards=[3]), ["abc"], VOCABULARY))["rows"]
    assert row["cells"] == [["a", 0, ids[:1], 1, 900, 0, ""], ["🙂", 1, ids[1:], 2, 600, 0, ""]]


def test_special_tokens_bear_their_name() -> None:
    trace = traced(step_of(4, 0, [40, 2], [0.9, 0.8], [0, 1]))
    (row,) = data_of(trace.page(Generation([[40, 2]], [1], forwards=[2]), ["abc"], VOCABULARY))["rows"]
    assert row["cells"][1][TEXT] == "<eos>" and row["cells"][1][KIND] == "special"


NASTY = "</script><script>alert(1)</script><!--<script>&amp;\u2028\u2029 \0 {{data}} $& \\1 🙂"


def test_texts_cannot_leave_their_place() -> None:
    """A prompt that would end the script, or fill another place of the template."""
    page = Trace().page(Generation([[], []], [0, 0], forwards=[0, 0]), [NASTY, NASTY], None, {"model": NASTY})
    data = data_of(page)
    assert [row["prompt"] for row in data["rows"]] == [NASTY] * 2
    assert data["settings"] == [f"model {NASTY}"]
    assert page.count("alert(1)") == page.count("&lt;script&gt;alert(1)") + page.count("\\u003cscript\\u003ealert(1)")
    assert json.loads(script_json(NASTY)) == NASTY
    assert script_json(NASTY).isascii() and not re.search("[<>&]", script_json(NASTY))
    page.encode()
    assert json.loads(script_json("half \ud800")) == "half \ud800"


def test_the_template_is_small_and_alone() -> None:
    text = TEMPLATE.read_text()
    assert len(text.splitlines()) < 400 and "http://" not in text and "https://" not in text
    assert "default-src 'none'" in text and sorted(re.findall(r"\{\{(\w+)\}\}", text)) == ["data", "text", "title"]


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    trace, out = Trace(), Generation([[]], [0], forwards=[0])
    trace.write(tmp_path / "out.html", out, ["x"])
    assert (tmp_path / "out.html").read_text() == trace.page(out, ["x"])
    with pytest.raises(ValueError, match="prompts: 2, expected those of the 1 rows"):
        trace.write(tmp_path / "other.html", out, ["x", "no such row"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]


# ---- experts ----


@pytest.mark.parametrize("mode", ["mask_diffusion", "mock_ar", "speculative"])
def test_every_token_counts_at_its_experts(model: TwoTower, mode: str) -> None:
    sizes: list[int] = []
    denoise = model._denoise
    model._denoise = lambda block, *a, **k: (sizes.append(block.numel()), denoise(block, *a, **k))[1]
    try:
        with Trace(model) as trace:
            options = dict(mode=mode, max_new_tokens=12, draft_steps=2, seed=0, eos_token_id=None)
            out = model.generate(prompts := prompts_of([4, 7]), on_step=trace, **options)
    finally:
        del model._denoise
    experts = data_of(trace.page(out, prompts, None, {"mode": mode}))["experts"]
    assert experts["layers"] == [i for i, kind in enumerate(CONFIG.pattern) if kind == "E"]
    load = torch.tensor(experts["load"])  # [steps, layers, experts]
    assert load.shape == (trace.steps, len(experts["layers"]), CONFIG.n_routed_experts)
    assert experts["most"] == load.max()
    assert (load.sum((0, 2)) == CONFIG.num_experts_per_tok * sum(sizes)).all()
    if mode != "speculative":  # a step for every pass
        assert (load.sum(-1) == CONFIG.num_experts_per_tok * torch.tensor(sizes).unsqueeze(1)).all()
    first = load[0, 0]
    expected = f"{int((first > 0).sum())} of {len(first)} used, at most {int(first.max())} tokens each"
    assert experts["lines"][0][0] == expected
    assert all(moe.load is None for moe in trace.layers.values())


def test_counting_changes_no_token(model: TwoTower) -> None:
    prompts = prompts_of([6])
    with Trace(model) as trace:
        got = model.generate(prompts, on_step=trace, max_new_tokens=16)
    assert got == model.generate(prompts, max_new_tokens=16)


def test_experts_are_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match="no denoiser with experts"):
        Trace(TwoTower(CONFIG, towers="context"))
