"""Nobody waits for a compiler in the middle of a text: sizes that change from call to call make no further kernels."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from triton import runtime

from bench.generate import config_of
from profiling.predict.passes import record
from tools import aot
from tt_kernels.runtime.launch import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="kernels that are interpreted are not compiled")
BATCHES = (1, 2, 3, 7, 8, 15, 16, 17, 32, 33, 48, 64)
STEPS = [
    (kind, b, context, 1) for kind in ("denoise", "commit", "ar") for b in BATCHES for context in (1, 16, 500, 4096)
]
LENGTHS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 48, 64, 65, 127, 128, 500, 512, 1000, 2048, 4000, 4096)
PREFILLS = [("prefill", b, 0, length) for b in (1, 3, 16) for length in LENGTHS]


def numbers(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each number among a launch's arguments, those in tuples too, and what Triton compiles for: its type, and whether
    it is 1 or a multiple of 16."""

    def parts(name: str, type_: Any, kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(type_, tuple):
            names = getattr(value, "_fields", range(len(value)))
            for inner in zip(names, type_, kind, value, strict=True):
                yield from parts(f"{name}.{inner[0]}", *inner[1:])
        elif isinstance(value, int):
            yield name, (type_, kind)

    *_, bind = kernel.device_caches[runtime.driver.active.get_current_device()]
    bound, kinds, _ = bind(*args, **options, debug=False, instrumentation_mode="")
    constants = {p.name for p in kernel.params if p.is_constexpr}
    for (name, value), kind in zip(bound.items(), kinds, strict=False):
        if name not in constants:
            yield from parts(name, *kind, value)


def test_sizes_that_change_from_call_to_call_compile_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 1 to 64 and lengths of 1 to 4096: one kernel for each set of tiles and of tensors that are there."""
    monkeypatch.setattr(runtime.driver, "_active", aot.Target(90))
    config = replace(config_of("published"), pattern="M*EM", vocab_size=4096, mask_token_id=3)
    seen: dict[Any, dict[str, set[Any]]] = defaultdict(lambda: defaultdict(set))
    for kind, batch, context, length in [*STEPS, *PREFILLS]:
        for kernel, _, args, options in record(config, kind, batch=batch, context=context, length=length).launches:
            for name, kind_of in numbers(kernel, args, options):
                seen[kernel.__name__, tuple(options.items())][name].add(kind_of)
    assert len(seen) > 50
    changing = {
        (kernel, name) for (kernel, _), kinds in seen.items() for name, sizes in kinds.items() if len(sizes) > 1
    }
    assert not changing, "these arguments belong into do_not_specialize, or out of their tuples"
