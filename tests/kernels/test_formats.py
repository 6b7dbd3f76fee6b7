"""Weight formats of the experts: an entry of FORMATS serves reference and checks; kernels refuse what they cannot."""

import pytest
import torch
from parity import KERNELS, make

from cards import OPS
from tt_kernels import ExpertWeights, Matrix, experts, reference
from tt_kernels.reference.moe import FORMATS, Format

OP = OPS["experts"]
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format for these tests: fp8 numbers with a scale for each expert."""

    def dequantized(matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
        assert matrix.scale is not None
        return matrix.data.to(dtype) * matrix.scale.to(dtype)[..., None, None]

    monkeypatch.setitem(FORMATS, "test_fp8", Format(dequantized, FP8, lambda shape: tuple(shape[:-2])))


def quantized(weight: torch.Tensor) -> Matrix:
    scale = weight.abs().amax((-2, -1)).float() / 448
    return Matrix((weight / scale[..., None, None]).to(FP8), scale, "test_fp8")


def fp8_case() -> dict:
    kwargs = make(OP, OP.cases[1], torch.float32)
    w, s = kwargs["weights"], kwargs["shared"]
    return kwargs | dict(weights=ExpertWeights(*map(quantized, w)), shared=ExpertWeights(*map(quantized, s)))


@pytest.mark.skipif(KERNELS, reason="no kernel reads fp8")
def test_a_format_without_a_kernel_runs_as_the_reference() -> None:
    kwargs = fp8_case()
    plain = {
        name: ExpertWeights(*(FORMATS["test_fp8"].dequantized(m, torch.float32) for m in kwargs[name]))
        for name in ("weights", "shared")
    }
    got = experts(**kwargs)
    assert torch.equal(got, reference.experts(**kwargs | plain))
    torch.testing.assert_close(got, OP.fn(**make(OP, OP.cases[1], torch.float32)), rtol=0.2, atol=0.2)  # 4 bits of 24


def test_a_tensor_stands_for_a_matrix() -> None:
    kwargs = make(OP, OP.cases[0], torch.float32)
    wrapped = ExpertWeights(*(None if w is None else Matrix(w) for w in kwargs["weights"]))
    assert torch.equal(experts(**kwargs), experts(**kwargs | dict(weights=wrapped)))


def test_what_disagrees_with_the_format_is_named() -> None:
    kwargs = fp8_case()
    up = kwargs["weights"].up
    for bad, message in (
        (up._replace(format="fp9"), "up.format is 'fp9', expected None or 'test_fp8'"),
        (up._replace(scale=None), r"up.scale is None, expected a tensor \[6\]"),
        (up._replace(data=up.data.float()), "up is torch.float32, expected torch.float8_e4m3fn"),
    ):
        with pytest.raises(ValueError, match=f"^experts: {message}"):
            experts(**kwargs | dict(weights=kwargs["weights"]._replace(up=bad)))


@pytest.mark.kernels
@pytest.mark.skipif(not KERNELS, reason="kernels run in the interpreter or on a GPU")
def test_a_format_without_a_kernel_is_refused_where_kernels_run() -> None:
    with pytest.raises(NotImplementedError, match="no kernel reads weights in the format 'test_fp8'"):
        experts(**fp8_case())
