"""Functions inside kernels that two or more of them share."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp2(-1.4426950408889634 * x))  # one ex2.approx; tl.exp adds range checks


@triton.jit
def silu(x):
    return x * sigmoid(x)
