"""What passes without gradients need of the weights, made once: functions of a parameter, parameters side by side.

Parameters stay what they are: state dicts, loading and training see them, and a changed one is seen here.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def _is_plain(*tensors: Tensor) -> bool:
    """Whether no gradient is wanted for these and they are real: a trace and fake tensors have no memory to look at."""
    if torch.compiler.is_compiling() or not all(type(t) is nn.Parameter for t in tensors):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


class Constant:
    """A function of one parameter, kept while no gradient is wanted for it.

    It is made anew when the parameter has been replaced, moved or written to (its version counts writes), into the same
    memory where it fits, so that a CUDA graph which read it goes on reading the newest; and after each pass with
    gradients, as some optimisers write past the version. Only a write to `.data`, which no pass with gradients follows,
    is not seen.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function
        self.of: Tensor | None = None  # the parameter that `value` was made of, and as which it was then
        self.seen: tuple[object, ...] = ()
        self.value: Tensor | None = None

    def __reduce__(self) -> tuple[object, ...]:  # a copy makes its own
        return Constant, (self.function,)

    def __call__(self, parameter: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.function(parameter)
        if not _is_plain(parameter) or parameter.is_inference() or parameter.is_meta:
            self.of = None
            return self.function(parameter)
        seen = parameter.data_ptr(), parameter._version, parameter.dtype, parameter.device
        if self.value is None or self.of is not parameter or self.seen != seen:
            if parameter.is_cuda and torch.cuda.is_current_stream_capturing():  # its memory would be the graph's
                return self.function(parameter)
            with torch.inference_mode(False), torch.no_grad():  # what it enters may want gradients for something else
                made = self.function(parameter.detach())
                if self.value is not None and (self.value.dtype, self.value.device) == (made.dtype, made.device):
                    self.value.copy_(made)
                else:
                    self.value = made
            self.of, self.seen = parameter, seen
        return self.value


def lay_side_by_side(parameters: Sequence[Tensor | None]) -> None:
    """Move the values of parameters, matrices of as many columns or vectors, one behind the other in memory, where they
    are not yet. Whoever shares their memory with others keeps it."""
    given = [p for p in parameters if p is not None]
    apart = len(given) != len(parameters) or {type(p) for p in given} != {nn.Parameter}
    if apart or given[0].is_meta or len({(p.dtype, p.device) for p in given}) > 1 or _are_side_by_side(given):
        return
    if any(p.device.type == "cpu" and p.is_shared() for p in given):
        return
    with torch.no_grad():
        parts = torch.cat([p.detach() for p in given]).split([len(p) for p in given])
        for parameter, part in zip(given, parts, strict=True):
            parameter.data = part


def _are_side_by_side(parameters: Sequence[Tensor]) -> bool:
    end = parameters[0].data_ptr()
    for p in parameters:
        if p.data_ptr() != end or not p.is_contiguous():
            return False
        end += p.nbytes
    # Two allocations may touch: those are no tensor.
    return parameters[0].untyped_storage().data_ptr() == parameters[-1].untyped_storage().data_ptr()


def joined(parameters: Sequence[Tensor]) -> Tensor | None:
    """Parameters that lie side by side, as one tensor; None where they do not, or a gradient is wanted."""
    if not _is_plain(*parameters) or not _are_side_by_side(parameters):
        return None
    first = parameters[0].detach()
    return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())
