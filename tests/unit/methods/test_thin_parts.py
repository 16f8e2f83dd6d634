"""Thin parts: shapes from boundary to boundary, every position seen, and values that follow from the seed alone."""

import pytest
import torch

from lowmem_pnn.methods.thin_parts import make_thin_part
from lowmem_pnn.model.chain import TensorSpec


def spec(*shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(shape, dtype)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((3, 32, 32), (16, 32, 32)),
        ((16, 32, 32), (64, 4, 4)),
        ((16, 17, 9), (8, 9, 5)),
        ((16, 15, 15), (8, 6, 6)),
        ((4, 8, 8, 8), (6, 4, 4, 4)),
        ((16, 8, 8), (10,)),
        ((20,), (5,)),
        ((7, 12), (7, 5)),
        ((7, 12), (5,)),
    ],
)
@pytest.mark.parametrize("is_last", [False, True])
def test_a_thin_part_goes_from_one_boundary_to_the_other(before: tuple[int, ...], after: tuple[int, ...], is_last: bool) -> None:
    part = make_thin_part(spec(*before), spec(*after), is_last=is_last)
    assert part is not None
    outputs = part(torch.randn(3, *before))
    assert outputs.shape == (3, *after)
    # The model's own outputs have no activation.
    assert not is_last or bool((outputs < 0).any())


def test_a_wide_stride_leaves_no_position_out() -> None:
    part = make_thin_part(spec(2, 32, 32), spec(4, 4, 4), is_last=False)
    assert part is not None
    samples = torch.randn(2, 2, 32, 32, requires_grad=True)
    part(samples).pow(2).sum().backward()
    assert samples.grad is not None
    assert bool((samples.grad != 0).any(0).all())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (spec(5, dtype=torch.int64), spec(5, 8)),
        (spec(3, 32, 32), spec(17, 64)),
        (spec(7, 12), spec(6, 12)),
        (spec(8), spec(8, 4, 4)),
    ],
)
def test_there_is_no_thin_part_between_some_boundaries(before: TensorSpec, after: TensorSpec) -> None:
    assert make_thin_part(before, after, is_last=False) is None
