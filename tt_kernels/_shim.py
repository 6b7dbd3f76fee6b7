
from typing import NamedTuple
import torch
from torch import Tensor
from . import ssm as _ssm, conv1d as _c
class MambaWeights(NamedTuple):
    conv_weight: Tensor
    conv_bias: Tensor | None
    A: Tensor
    D: Tensor | None
    dt_bias: Tensor
class MambaState(NamedTuple):
    conv: Tensor
    ssm: Tensor
    conv_indices: Tensor | None = None
    ssm_indices: Tensor | None = None
    conv_out_indices: Tensor | None = None
    ssm_out_indices: Tensor | None = None
def _read(s):
    return (s.conv if s.conv_indices is None else s.conv[s.conv_indices.long()]), (s.ssm if s.ssm_indices is None else s.ssm[s.ssm_indices.long()])
def _write(s, conv, ssm):
    s.conv[s.conv_out_indices.long()] = conv
    s.ssm[s.ssm_out_indices.long()] = ssm
def mamba_block(xBC, dt, w, s, *, dt_limit):
    return _ssm.mamba_block(xBC, dt, *w, *_read(s), dt_limit=dt_limit)
def mamba_advance(xBC, dt, w, s, counts=None, *, dt_limit):
    _write(s, *_ssm.mamba_advance(xBC, dt, w.conv_weight, w.conv_bias, w.A, w.dt_bias, *_read(s), counts, dt_limit=dt_limit))
def mamba_extend(xBC, dt, w, s, counts=None, *, dt_limit):
    L = xBC.shape[1]
    if L == 1 and counts is None:
        y, *st = _ssm.mamba_step(xBC.squeeze(1), dt.squeeze(1), *w, *_read(s), dt_limit=dt_limit)
        _write(s, *st)
        return y.unsqueeze(1)
    if L <= 64:
        y = mamba_block(xBC, dt, w, s, dt_limit=dt_limit)
        mamba_advance(xBC, dt, w, s, counts, dt_limit=dt_limit)
        return y
    conv, ssm = _read(s)
    H, P, N = ssm.shape[1:]
    c = _c.causal_conv1d(xBC, w.conv_weight, w.conv_bias, conv)
    GN = (c.shape[-1] - H * P) // 2
    x, B, C = c.split_with_sizes([H * P, GN, GN], -1)
    b = len(c)
    y, final, _ = _ssm.ssd_chunk(x.view(b, L, H, P), dt, w.A, B.view(b, L, -1, N), C.view(b, L, -1, N), w.D, w.dt_bias, ssm, counts, chunk_size=None, dt_limit=dt_limit)
    _write(s, _c.conv_state(xBC, counts, conv, kernel_size=conv.shape[-1]), final)
    return y
