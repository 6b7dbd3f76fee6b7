"""The bundled model's card: its figures of quality are the last ones that were recorded."""

import json

from bench.measure import RESULTS, in_a_line
from bench.report import KEYS
from eval import quality
from tt_model.two_tower import ASSETS


def test_the_card_has_what_was_recorded() -> None:
    card, newest = (ASSETS / "README.md").read_text(), {}
    for file in sorted(RESULTS.glob("*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            if line.get("kind") == "quality" and line["model"] == "bundled":
                newest[json.dumps([line[key] for key in KEYS["quality"] if key in line])] = line
    assert len(newest) >= 2
    for line in newest.values():
        assert quality.markdown(line["arms"]) in card
        assert in_a_line(line["machine"]).split(", ", 1)[1] in card
        about = quality.about(line)
        assert about[0].upper() + about[1:] in card
