"""What a card says of an op; tests, compiler report and bench rows are made from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tt_kernels import reference
from tt_kernels.runtime.launch import Launch


@dataclass(frozen=True, kw_only=True)
class Op:
    """One op's card: all that tests and benchmarks need to know about it."""

    fn: Callable[..., Any]  # the public function
    when: str = ""  # in a line: when it is the one to use; docs/kernels.md has it
    inputs: Callable[..., dict[str, Any]]  # (dtype, **dims) -> keyword arguments, random; the caller seeds torch
    cases: tuple[dict[str, int], ...]  # small dims, ragged and empty ones too; the first serves gradcheck and compile
    shapes: tuple[dict[str, int], ...]  # the published model's own
    outputs: tuple[str, ...]
    cost: Callable[..., tuple[int, int]]  # (itemsize, **dims) -> (flops, bytes read and written)
    grads: tuple[str, ...] = ()  # differentiable arguments; "a.b" is field b of argument a
    writes: tuple[str, ...] = ()  # arguments that the op changes
    kernels: tuple[str, ...] = ()  # names of the Triton kernels it runs as; none: the reference on every device
    grows: dict[str, int] = field(default_factory=dict)  # sizes that differ from call to call, and how far they go
    # Kernels that must compile to wgmma on sm_90, and the tile that is the products' M: wherever it is 64 or more.
    tensor_cores: dict[str, str] = field(default_factory=dict)
    candidates: Mapping[str, tuple[Launch, ...]] = field(default_factory=dict)  # kernel -> launches worth measuring
    rms: float = 1.25  # bound on 16-bit results: root mean square of a kernel's error over PyTorch's; above: say why

    @property
    def reference(self) -> Callable[..., Any]:
        """Its twin: same name, same signature."""
        return getattr(reference, self.fn.__name__)

    @property
    def forward_only(self) -> bool:
        """Whether its kernels have no backward: where gradients are wanted the reference runs."""
        return bool(self.kernels) and not any("_bwd_" in name for name in self.kernels)
