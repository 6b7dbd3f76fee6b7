"""docs/experiments.md and its figures from what is recorded. Nothing here knows a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from bench.figures import MARKERS, SERIES, Figure
from bench.measure import in_a_line, table

from .. import quality
from ..intervals import Estimate
from .plan import DEFAULT
from .work import MODEL, Experiments, Job, Line

NOTES = "notes.md"  # beside the results: "## threshold" and so on, what their author says of each part
HEAD = """# The method at toy scale

Made by `python -m eval.experiments` from the lines of `eval/results/`, words of its own from `eval/results/notes.md`:
edit neither this page nor its figures. The task is that of [training.md](training.md): a line specifies a program, and
what is written is compared with it character by character (exact) and executed. Intervals are 95 % over specifications.
A training run is one run: what another seed changes stands in the tables."""
SOURCES = """The paper is Nemotron-Labs-TwoTower, arXiv 2606.26493: 30 B parameters a tower, other tasks; what can agree
is a direction. The first two rows are from its abstract, the others as readings of the paper by others quote its
tables. Of expert overlap and of the options of training no figures were found. "Open": the intervals do not decide."""
TITLES = {
    "threshold": "Quality and tokens a denoiser pass, over the threshold and over steps",
    "block": "Blocks trained, blocks written",
    "towers": "Time conditioning, tied towers, a context tower that learns",
    "experts": "Experts that a block uses",
    "options": "What each option of training gives",
}
ARM = f"diffusion {DEFAULT:g}"


def estimate(line: Line | None, arm: str, column: str) -> Estimate | None:
    found = line and line["arms"].get(arm, {}).get(column)
    return Estimate(*found) if found else None


def text(found: Estimate | None, column: str) -> str:
    return found.text(*quality.SHOWN[column]) if found else "-"


def beside(found: Estimate | None, paper: float) -> str:
    """Whether a figure is at least the paper's."""
    if found is None:
        return "-"
    return "yes" if found.low >= paper else "no: lower" if found.high < paper else "open"


def falls(before: Estimate | None, after: Estimate | None) -> str:
    """Whether the second is lower than the first."""
    if before is None or after is None:
        return "-"
    return "yes" if after.high < before.low else "no: higher" if after.low > before.high else "open"


class Page:
    """The recorded lines of what is planned, and texts made of them."""

    def __init__(self, experiments: Experiments):
        lines = experiments.lines()
        self.runs = [run for run in experiments.pilot.runs() if run.blocks]
        self.sizes = {run.name: experiments.pilot.parsed(run.name).block_size for run in self.runs}
        self.sampled = experiments.pilot.sampled
        # Denoisers of so few steps are rarely right at a low threshold: they are compared at the highest.
        self.threshold_of_runs = f"{experiments.pilot.thresholds[-1]:g}"
        self.jobs = experiments.jobs()
        self.found: dict[Job, Line] = {job: line for job in self.jobs if (line := experiments.of(job, lines))}
        notes = experiments.results / NOTES
        parts = notes.read_text(encoding="utf-8").split("\n## ") if notes.is_file() else []
        self.notes = {part.split("\n")[0].removeprefix("## "): part.partition("\n")[2].strip() for part in parts}

    def get(self, kind: str, run: str, size: int | None = None) -> Line | None:
        """A line; size: of the blocks that were written, where it is not the run's own."""
        size = None if size == self.sizes.get(run) else size
        wanted = lambda job: (job.kind, job.run, job.block_size) == (kind, run, size)
        return next((line for job, line in self.found.items() if wanted(job)), None)

    def exact(self, run: str, size: int | None = None) -> Estimate | None:
        return estimate(self.get("quality", run, size), f"diffusion {self.threshold_of_runs}", "exact")

    def claims(self) -> Iterator[tuple[str, ...]]:
        """What the paper says, and what stands for it here."""
        model = self.get("quality", MODEL)
        for column, what, paper, shown in (
            ("kept", "of AR's quality kept", 0.987, "98.7 %"),
            ("times_ar", "tokens/s, times AR's", 2.42, "2.42"),
        ):
            found = estimate(model, ARM, column)
            yield (f"{what}, threshold {DEFAULT:g}", shown, text(found, column), beside(found, paper))
        pair = lambda one, other: f"{text(one, 'exact')}, {text(other, 'exact')}"
        few, many = self.exact("base", 16), self.exact("base", 64)
        what = f"trained at block 16, written at 16 and at 64, threshold {self.threshold_of_runs}"
        yield (what, "HumanEval 76.4, 19.85", pair(few, many), falls(few, many))
        base = self.exact("base")
        scores = "generation 74.12, 72.94; code 69.61, 68.64; mathematics 81.30, 80.57"
        for run, what, paper in (
            ("no-time", "with time conditioning, without", scores),
            ("trained", "context tower frozen, trained", "26 to 28 % lower"),
            ("tied", "towers apart, tied", "26 to 28 % lower"),
        ):
            other = self.exact(run)
            yield (what, paper, pair(base, other), falls(base, other))

    # ---- parts ----

    def threshold(self) -> Iterator[str | Figure]:
        if line := self.get("quality", MODEL):
            yield f"{quality.about(line)}. `static 4`: 4 passes a block, whatever the confidence."
            yield quality.markdown(line["arms"])
            arms = {name: {c: arm[c] for c in ("exact", "tokens_per_forward")} for name, arm in line["arms"].items()}
            title = f"{line['model']}: exactly right over tokens a denoiser pass"
            yield Figure("experiments_threshold.svg", title, title, [arms], over_tokens)

    def block(self) -> Iterator[str | Figure]:
        rows, points = [], []
        arm = f"diffusion {self.threshold_of_runs}"
        for run in (run for run in self.runs if "block" in run.blocks):
            for size in self.sampled:
                if line := self.get("quality", run.name, size):
                    cell = lambda column, line=line: text(estimate(line, arm, column), column)
                    columns = ("exact", "runs", "tokens_per_forward", "passes")
                    rows.append((f"{self.sizes[run.name]}", size, *map(cell, columns)))
                    points.append((self.sizes[run.name], size, self.exact(run.name, size)))
        if rows:
            yield f"Threshold {self.threshold_of_runs}; the baseline's recipe and steps at each block size."
            yield table(("trained", "written", "exact", "runs", "tokens a denoiser pass", "passes"), rows)
            title = "Exactly right, by the block that is written"
            yield Figure("experiments_block.svg", title, title, points, over_blocks)

    def compared(self, block: str) -> Iterator[str | Figure]:
        """A row for each run, beside the baseline."""
        runs = [run for run in self.runs if block in run.blocks]
        lines = {run.name: (self.get("training", run.name), self.get("quality", run.name)) for run in runs}
        losses = {name: training["held_out"] for name, (training, _) in lines.items() if training}
        if not losses:
            return
        base, rows = losses.get("base"), []
        arms = list(next((q["arms"] for _, q in lines.values() if q), {}))
        arms = [arm for arm in arms if arm.startswith("diffusion")]
        for run in runs:
            training, found = lines[run.name]
            if training is None:
                continue
            difference = "-" if base is None or run.name == "base" else f"{training['held_out'] - base:+.3f}"
            each = [(arm, column) for arm in arms for column in ("exact", "tokens_per_forward")]
            cells = [text(estimate(found, *name), name[1]) for name in (*each, ("AR", "exact"))]
            speed = f"{training['tokens_per_s']:.0f}"
            loss = f"{training['held_out']:.3f}"
            rows.append((run.about, training["steps"], loss, difference, *cells, speed))
        named = [w for arm in arms for w in (f"exact, {arm.split()[1]}", f"tokens a denoiser pass, {arm.split()[1]}")]
        yield table(("", "steps", "held out", "to the first", *named, "exact, AR", "trained tokens/s"), rows)
        about = {run.name: run.about for run in runs}
        if len(losses) > 2 and "base" in losses and "seed" in losses:
            yield beyond_noise(losses, about)
        title = "Held-out loss of the published objective, nats a token"
        yield Figure(f"experiments_{block}.svg", title, title, [(about[n], loss) for n, loss in losses.items()], dots)

    def experts(self) -> Iterator[str | Figure]:
        line = self.get("experts", MODEL)
        if line is None:
            return
        yield (
            f"{line['model']}: {line['experts']} experts, {line['top_k']} a token, blocks of {line['block_size']}. "
            f'Independent even draws would use {line["even"]:.2f} of them; "alike" is what independent draws would, '
            "that take each expert as often as the layer does."
        )
        rows = [(x["layer"], x["state"], f"{x['distinct']:.2f}", f"{x['alike']:.2f}") for x in line["layers"]]
        yield table(("layer", "tower", "different experts", "alike"), rows)
        fewer = sum(x["distinct"] < x["alike"] for x in line["layers"])
        yield f"In {fewer} of {len(rows)} rows a block uses fewer than independent draws alike would."
        title = "Different experts in a block"
        shown = [{"even": line["even"], "layers": line["layers"]}]
        yield Figure("experiments_experts.svg", title, title, shown, over_layers)

    def parts(self) -> Iterator[str | Figure]:
        """All of the page."""
        yield HEAD
        machines = [line["machine"] for line in self.found.values()]
        latest = {in_a_line(machine | {"load": 0, "date": ""}): machine for machine in machines}
        yield "\n".join(f"- {in_a_line(machine)}" for machine in latest.values())
        yield "Trained here: denoisers of the bundled model's context tower, each but for one thing as the baseline."
        if base := self.get("training", "base"):
            yield f"The baseline: `{base['command']}`"
        yield "## Beside the paper"
        yield SOURCES
        yield table(("what", "the paper", "here", "as in the paper"), list(self.claims()))
        for block, title in TITLES.items():
            yield f"## {title}"
            special: Callable[[], Iterator[str | Figure]] = getattr(self, block, partial(self.compared, block))
            made = list(special())
            yield from made or ["Not measured yet."]
            waiting = [job.label for job in self.jobs if block in job.blocks and job not in self.found]
            if made and waiting:
                yield f"Not measured yet: {'; '.join(waiting)}."
            if note := self.notes.get(block):
                yield note


def beyond_noise(losses: Mapping[str, float], about: Mapping[str, str]) -> str:
    """Which losses differ from the baseline's by more than another seed's does."""
    base, noise = losses["base"], abs(losses["seed"] - losses["base"])
    others = [name for name in losses if name not in ("base", "seed")]
    lower = [about[n] for n in others if losses[n] < base - noise]
    higher = [about[n] for n in others if losses[n] > base + noise]
    said = f"Another seed changes the held-out loss by {noise:.3f}. By more than that "
    return said + f"lower: {', '.join(lower) or 'none'}; higher: {', '.join(higher) or 'none'}."


# ---- figures ----


def spread(axes: Any, points: Sequence[tuple[float, Estimate]], **style: Any) -> None:
    """Shares in percent with their intervals."""
    ends = [[100 * (e.value - e.low) for _, e in points], [100 * (e.high - e.value) for _, e in points]]
    axes.errorbar([x for x, _ in points], [100 * e.value for _, e in points], yerr=ends, capsize=2, **style)


def over_tokens(lines: Sequence[Mapping[str, Any]], axes: Any) -> None:
    (arms,) = lines
    for i, kind in enumerate(("AR", "diffusion", "static", "speculative")):
        mine = {name: arm for name, arm in arms.items() if name.split()[0] == kind}
        if points := [(arm["tokens_per_forward"][0], Estimate(*arm["exact"])) for arm in mine.values()]:
            label = {"diffusion": "diffusion, by threshold", "static": "diffusion, by steps a block"}.get(kind, kind)
            spread(axes, points, marker=MARKERS[i], color=SERIES[i], label=label, linewidth=1)
            for name, (x, y) in zip(mine, points, strict=True):
                said = name.partition(" ")[2]
                axes.annotate(said, (x, 100 * y.value), xytext=(4, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="tokens a denoiser pass", ylabel="exactly right, %")


def over_blocks(points: Sequence[tuple[int, int, Any]], axes: Any) -> None:
    for i, trained in enumerate(dict.fromkeys(trained for trained, *_ in points)):
        mine = [(size, Estimate(*found)) for t, size, found in points if t == trained]
        spread(axes, mine, marker=MARKERS[i], color=SERIES[i], label=f"trained at {trained}")
    axes.set(xscale="log", xlabel="block that is written", ylabel="exactly right, %")
    sizes = sorted({size for _, size, _ in points})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.minorticks_off()


def dots(lines: Sequence[tuple[str, float]], axes: Any) -> None:
    names, losses = [name for name, _ in lines], [loss for _, loss in lines]
    axes.plot(losses, names, linestyle="", marker=MARKERS[0], color=SERIES[0])
    axes.axvline(losses[0], color=SERIES[-1], linewidth=1, label=names[0])
    axes.set(xlabel="nats a token")
    axes.invert_yaxis()


def over_layers(lines: Sequence[Mapping[str, Any]], axes: Any) -> None:
    (line,) = lines
    for i, state in enumerate(dict.fromkeys(x["state"] for x in line["layers"])):
        mine = [x for x in line["layers"] if x["state"] == state]
        layers, style = [x["layer"] for x in mine], {"color": SERIES[i], "marker": MARKERS[i]}
        axes.plot(layers, [x["distinct"] for x in mine], label=state, **style)
        axes.plot(layers, [x["alike"] for x in mine], linestyle=":", label=f"{state}, independent", **style)
    axes.axhline(line["even"], color=SERIES[-1], linewidth=1, label="independent, even")
    axes.set(xlabel="layer", ylabel="different experts", ylim=(0, None))
    axes.set_xticks(sorted({x["layer"] for x in line["layers"]}))
