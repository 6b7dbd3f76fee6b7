"""What passes without gradients need of the weights, made once.

Parameters stay what they are: state dicts, loading and training see them, and a changed one is seen here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Constant:
    """A function of parameters, kept while no gradient is wanted for them.

    It is made anew when one of them has been replaced, moved or written to (its version counts writes), into the same
    memory where it fits, so that a CUDA graph which read it goes on reading the newest; and after each pass with
    gradients, as some optimisers write past the version. Only a write to `.data`, which no pass with gradients follows,
    is not seen.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        # The parameters that `value` was made of, held so that no other gets their ids.
        self.of: tuple[Tensor, ...] = ()
        self.seen: list[Any] = []  # as which they were read
        self.value: Tensor | None = None

    def __reduce__(self) -> tuple[object, ...]:  # a copy makes its own
        return Constant, (self.function,)

    def __call__(self, *parameters: Tensor) -> Tensor:
        value = self.kept(*parameters)
        return self.function(*parameters) if value is None else value

    def kept(self, *parameters: Tensor) -> Tensor | None:
        """The value; None where it cannot be kept: a gradient is wanted, writes are not counted, or in a trace."""
        if torch.compiler.is_compiling():
            return None
        gradients = torch.is_grad_enabled()
        if any(type(p) is not nn.Parameter or p.is_inference() or (gradients and p.requires_grad) for p in parameters):
            self.of = ()
            return None
        seen = [(id(p), p.data_ptr(), p._version, p.dtype, p.device) for p in parameters]
        if not self.of or self.seen != seen:
            if parameters[0].is_cuda and torch.cuda.is_current_stream_capturing():  # its memory would be the graph's
                return None
            with torch.inference_mode(False), torch.no_grad():  # what it enters may want gradients for something else
                made, old = self.function(*(p.detach() for p in parameters)), self.value
                if old is not None and (old.shape, old.dtype, old.device) == (made.shape, made.dtype, made.device):
                    old.copy_(made)
                else:
                    self.value = made
            self.of, self.seen = parameters, seen
        return self.value
