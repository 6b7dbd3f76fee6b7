"""`make bench`: the CPU comparison among the benchmarks that pytest collects; nothing is asserted about its figures."""

from . import cpu


def test_cpu_comparison() -> None:
    assert cpu.main([]) == 0
