"""`make bench`: the CPU comparison among the benchmarks that pytest collects; nothing is asserted about its figures."""

from bench import cpu


def test_cpu_comparison() -> None:
    # Short: the other benchmarks are to have their share of the time. Figures to quote are `python -m bench.cpu`'s.
    assert cpu.main(["--rounds", "3", "--prompt", "32", "--new", "16", "--context", "64"]) == 0
