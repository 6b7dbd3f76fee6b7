"""`make bench`: the whole model among the benchmarks that pytest collects; nothing is asserted about its figures."""

import pytest

from bench import generate


def test_card() -> None:
    assert generate.main(["--card", "--model", "published", "--batch", "1", "32", "--context", "2048"]) == 0


def test_whole_model(request: pytest.FixtureRequest) -> None:
    assert generate.main(["--record"] if request.config.getoption("--record") else []) == 0
