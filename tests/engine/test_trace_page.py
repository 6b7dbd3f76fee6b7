"""The trace's page in Chromium, where there is one: it fits, says nothing on the console, and replays."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_trace import CONFIG, MODES, VOCABULARY, prompts_of, random_model

from tt_model import TwoTower
from tt_model.engine.trace import Trace

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian's package: chromium)")

# What a test's script may use.
TOOLS = """
const key = (name, more = {}, to = document.body) =>
  to.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true, ...more }));
const sleep = time => new Promise(done => setTimeout(done, time));
const count = name => document.querySelectorAll("#text ." + name).length;
const look = () => ({
  pass: +document.body.dataset.pass, line: document.getElementById("line").textContent, taken: count("taken"),
  fresh: count("new"), masked: count("masked"), later: count("later"), slider: +document.getElementById("pass").value,
  said: document.getElementById("pass").getAttribute("aria-valuetext"),
  text: [...document.querySelectorAll("#text .taken > span")].map(box => box.textContent).join(""),
});
const screen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const over = (colours) => {  // what colours painted over each other look like
  for (const colour of colours) { screen.fillStyle = colour; screen.fillRect(0, 0, 1, 1); }
  return [...screen.getImageData(0, 0, 1, 1).data].slice(0, 3).map(c => c / 255);
};
const light = rgb => rgb.map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const contrast = element => {
  const below = [];
  for (let e = element; e; e = e.parentElement) below.unshift(getComputedStyle(e).backgroundColor);
  const [a, b] = [over(below), over([...below, getComputedStyle(element).color])].map(light);
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
};
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every mode, of two prompts; the first with experts. One of token ids, without a vocabulary."""
    folder, found = tmp_path_factory.mktemp("pages"), {}
    bundled, random = TwoTower.from_pretrained(), random_model()
    prompts = ["def fibonacci(n):", "class Stack:\n    def push(self, " + "a_very_long_name" * 12]
    for mode in MODES:
        options = dict(mode=mode, max_new_tokens=40, confidence_threshold=0.3, seed=1, eos_token_id=None)
        with Trace(bundled if mode != "ar" else None) as trace:
            out = bundled.generate(prompts, on_step=trace, **options)
        found[mode] = folder / f"{mode}.html"
        trace.write(found[mode], out, prompts, VOCABULARY, {"mode": mode})
    with Trace(random) as trace:
        out = random.generate(ids := prompts_of([5]), on_step=trace, max_new_tokens=CONFIG.block_size * 3)
    trace.write(folder / "ids.html", out, ids)
    return found | {"ids": folder / "ids.html"}


def visited(page: Path, script: str, *, at: str = "", width: int = 800, dark: bool = False, calm: bool = False) -> dict:
    """What a script returns that runs in the page; the console must stay empty.

    The page is in a frame: a window of Chromium is never narrower than 500 pixels.
    """
    probe = f"<script>{TOOLS}(async () => {{ {script} }})().then(found => parent.postMessage(found, '*'))</script>"
    copy, frame = page.with_name(f"probed-{page.name}"), page.with_name("frame.html")
    copy.write_text(page.read_text().replace("</body>", f"{probe}</body>"))
    frame.write_text(
        f"""<meta name="color-scheme" content="light dark"><pre id="found"></pre><script>
        onmessage = event => {{ document.getElementById("found").textContent = JSON.stringify(event.data); }};
        </script><iframe src="{copy.name}{html.escape(at)}" width="{width}" height="900" frameborder="0"></iframe>"""
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=20000", "--window-size=1700,1000", "--hide-scrollbars", "--no-first-run"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--blink-settings=preferredColorScheme={int(not dark)}"]
    command += ["--force-prefers-reduced-motion"] * calm
    done = subprocess.run([*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize(
    ("mode", "width", "dark"),
    [
        *(("mask_diffusion", 400, True), ("mask_diffusion", 800, False), ("mask_diffusion", 1600, True)),
        *(("speculative", 400, False), ("speculative", 800, True), ("speculative", 1600, False)),
    ],
)
def test_it_fits_and_can_be_read(pages: dict[str, Path], mode: str, width: int, dark: bool) -> None:
    script = """
    const all = name => [...document.querySelectorAll(name)];
    const faint = all(".taken, dt, dd, #line, label, select, footer span, h2, small, .bar span")
      .filter(e => e.offsetParent && contrast(e) < 4.5).map(e => [e.className, e.textContent, contrast(e)]);
    const wide = all(".wrap *").filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML);
    return { width: innerWidth, page: document.documentElement.scrollWidth, wide, faint, layers: all(".layer").length,
             dark: matchMedia("(prefers-color-scheme: dark)").matches,
             colour: getComputedStyle(document.body).backgroundColor };
    """
    for at in ("#prompt=2", "#pass=7&colour=pass"):
        found = visited(pages[mode], script, at=at, width=width, dark=dark)
        assert (found["width"], found["dark"], found["layers"]) == (width, dark, 3)
        assert (found["wide"], found["page"] <= width) == ([], True)
        assert found["faint"] == []
        assert found["colour"] == ("rgb(18, 21, 24)" if dark else "rgb(246, 245, 241)")


@pytest.mark.parametrize("mode", [*MODES, "ids"])
def test_steps_change_what_is_shown(pages: dict[str, Path], mode: str) -> None:
    script = """
    const found = [look()];
    for (const name of ["ArrowLeft", "Home", "ArrowLeft", "ArrowRight", "ArrowRight", "End"]) {
      key(name); found.push(look());
    }
    document.querySelector("#text .taken").click(); found.push(look());
    document.getElementById("next").click(); found.push(look());
    document.querySelector("#strip i").click(); found.push(look());
    key("ArrowRight", { shiftKey: true }); found.push(look());
    await sleep(1000);
    return { found, hash: location.hash, lines: data.rows[0].lines, cells: data.rows[0].cells, end: row.passes.length };
    """
    got = visited(pages[mode], script, at="#pass=3")
    found, cells, end = got["found"], got["cells"], got["end"]
    clicked = cells[0][3]
    jumped = found[-1]["pass"]
    assert [state["pass"] for state in found] == [3, 2, 0, 0, 1, 2, end, clicked, min(clicked + 1, end), 1, jumped]
    assert jumped > 1 and got["hash"] == f"#prompt=1&pass={jumped}&colour=confidence"
    for state in found:
        n = state["pass"]
        assert state["line"].endswith(f" {n} of {end} · {got['lines'][n]}") and state["slider"] == n
        assert state["said"] == f"{n} of {end}"
        taken = [cell for cell in cells if 0 < cell[3] <= n]
        assert state["taken"] == len(taken) and state["fresh"] == sum(cell[3] == n for cell in taken)
        assert state["text"] == "".join(cell[0] for cell in taken)
        assert state["masked"] == sum(cell[5] <= n for cell in cells) - len(taken)
        assert state["masked"] + state["taken"] + state["later"] == len(cells)


def test_space_plays_to_the_end(pages: dict[str, Path]) -> None:
    script = """
    const name = () => document.getElementById("play").getAttribute("aria-label");
    const found = [name()];
    key(" "); found.push(name()); await sleep(500); key(" "); found.push(name());
    const paused = look().pass; await sleep(1000); found.push(look().pass === paused && paused > 0);
    document.getElementById("play").click(); await sleep(17000); found.push(name(), look().pass === row.passes.length);
    const select = document.getElementById("speed");
    found.push(key(" ", {}, select) && key("ArrowLeft", {}, select) && look().pass === row.passes.length);
    return { found, speed: select.value };
    """
    got = visited(pages["mask_diffusion"], script, at="#pass=0")
    assert got == {"found": ["Play", "Pause", "Play", True, "Play", True, True], "speed": "5"}


def test_motion_is_calm_where_asked(pages: dict[str, Path]) -> None:
    script = """return { speed: document.getElementById("speed").value,
                         moves: getComputedStyle(document.querySelector(".cell")).transitionDuration };"""
    assert visited(pages["ar"], script, calm=True) == {"speed": "2", "moves": "0s"}


def test_prompts_are_chosen(pages: dict[str, Path]) -> None:
    script = """
    const found = [document.querySelector("#text .prompt").textContent], select = document.getElementById("row");
    select.value = "1"; select.onchange(); found.push(document.querySelector("#text .prompt").textContent);
    location.hash = "#prompt=1&pass=2&colour=pass"; await sleep(100);
    found.push(document.querySelector("#text .prompt").textContent, look().pass, document.body.className, state.colour);
    location.hash = "#prompt=99&pass=-5"; await sleep(100);
    found.push(select.value, look().pass, document.getElementById("chooser").hidden);
    return found;
    """
    found = visited(pages["mock_ar"], script)
    first, second = "def fibonacci(n):", "class Stack:\n    def push(self, "
    assert found[0] == found[2] == first and found[1].startswith(second)
    assert found[3:] == [2, "by-pass", "pass", "1", 0, False]


def test_everything_has_a_name(pages: dict[str, Path]) -> None:
    """What can be reached by the keyboard says what it is."""
    script = """
    const reached = [...document.querySelectorAll("button, input, select")];
    return { unnamed: reached.filter(e => !e.getAttribute("aria-label") && !e.labels?.length).map(e => e.id),
             hidden: document.querySelectorAll('[aria-hidden=true] :is(button, input, select, [tabindex="0"])').length,
             language: document.documentElement.lang, live: document.getElementById("line").getAttribute("aria-live"),
             layer: document.querySelector(".load").getAttribute("aria-label"),
             lines: data.experts.lines[row.passes.at(-1).step] };
    """
    found = visited(pages["mask_diffusion"], script)
    assert (found["unnamed"], found["hidden"], found["language"], found["live"]) == ([], 0, "en", "polite")
    assert found["layer"] == f"layer 2: {found['lines'][0]}"
