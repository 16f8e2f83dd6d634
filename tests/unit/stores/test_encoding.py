"""How tensors are kept on disk: exactly where they can be, within known bounds where they cannot, and never hiding a bad value."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores.encoding import ENCODINGS, OverflowFault, decode, encode, encoded_bytes, encoded_layout
from lowmem_pnn.stores.header import NAME_BY_DTYPE

FLOAT32 = torch.float32


def keep(tensor: Tensor, encoding: str) -> list[Tensor]:
    """What a batch of samples is kept in; freshly allocated memory is filled first, so that nothing of it can pass for a result."""
    layout = encoded_layout(TensorSpec(tuple(tensor.shape[1:]), tensor.dtype), encoding)
    kept = [torch.full((len(tensor), *shape), 1, dtype=dtype) for dtype, shape in layout]
    encode(tensor, kept)
    return kept


def back(tensor: Tensor, encoding: str) -> Tensor:
    result = torch.full_like(tensor, 7, memory_format=torch.contiguous_format)
    decode(keep(tensor, encoding), result)
    return result


def values(*shape: int, seed: int = 0, spread: bool = True) -> Tensor:
    """Values whose groups have magnitudes of their own; of the samples the first is zero, and every third has no negative values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if spread:
        x = x * 10.0 ** torch.randint(-6, 7, (*shape[:2], *[1] * (len(shape) - 2)), generator=generator)
    x[1::3] = x[1::3].relu()
    x[0] = 0
    return x


@pytest.mark.parametrize("dtype", sorted(NAME_BY_DTYPE, key=str), ids=str)
@pytest.mark.parametrize("kind", ENCODINGS)
def test_what_is_no_float_or_would_not_be_smaller_is_kept_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    spec = TensorSpec((3, 32), dtype)
    layout = encoded_layout(spec, kind)
    narrow = kind != "float32" and dtype.is_floating_point and getattr(torch, kind).itemsize < dtype.itemsize
    assert (layout == ((dtype, (3, 32)),)) == (not narrow)
    if not narrow and dtype.itemsize <= 8:
        raw = torch.randint(256, (5 * spec.sample_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        raw = raw % 2 if dtype == torch.bool else raw
        tensor = raw.view(dtype).view(5, 3, 32)
        assert torch.equal(back(tensor, kind).view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((6, 8, 8), 6),  # channels of maps
        ((6, 4, 4), 6),
        ((6, 3, 5), 1),  # a scale for 15 values would not be small beside them
        ((5, 24), 5),  # tokens
        ((5, 8), 1),
        ((40,), 1),  # a vector
        ((2,), 1),
    ],
)
def test_groups_are_channels_tokens_or_samples_so_that_scales_stay_small(shape: tuple[int, ...], groups: int) -> None:
    assert encoded_layout(TensorSpec(shape, FLOAT32), "int8") == ((torch.int8, shape), (FLOAT32, (groups,)))
    assert encoded_bytes(TensorSpec(shape, FLOAT32), "int8") == math.prod(shape) + 4 * groups


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (1, 1)])
def test_a_tensor_of_at_most_one_value_is_kept_as_it_is(shape: tuple[int, ...]) -> None:
    assert encoded_layout(TensorSpec(shape, FLOAT32), "int8") == ((FLOAT32, shape),)
    tensor = torch.randn(4, *shape)
    for kind in ENCODINGS[::3]:
        assert torch.equal(back(tensor, kind), tensor)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("source", [torch.float32, torch.float64])
def test_a_shorter_float_rounds_to_the_nearest(kind: str, source: torch.dtype) -> None:
    tensor = values(9, 4, 5, spread=False).to(source)
    assert torch.equal(back(tensor, kind), tensor.to(getattr(torch, kind)).to(source))
    exact = torch.arange(-128.0, 128.0).view(16, 16).to(source)
    assert torch.equal(back(exact, kind), exact)


def test_int8_keeps_whole_steps_exactly() -> None:
    # From -127 to 127, and from 0 to 255, in powers of two: the scale is one, and so is every quotient.
    for steps in (torch.arange(-127.0, 128.0), torch.arange(0.0, 256.0)):
        for power in (-20, 0, 9):
            tensor = (steps * 2.0**power).expand(3, -1)
            assert torch.equal(back(tensor, "int8"), tensor)


@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple),
    count=st.integers(1, 7),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
@settings(deadline=None, max_examples=100)
def test_int8_is_within_half_a_step_and_zeros_stay_zeros(
    shape: tuple[int, ...], count: int, seed: int, dtype: torch.dtype
) -> None:
    tensor = values(count, *shape, seed=seed, spread=dtype != torch.float16).to(dtype)
    result = back(tensor, "int8")
    assert result.dtype == dtype
    layout = encoded_layout(TensorSpec(shape, dtype), "int8")
    if len(layout) == 1:
        assert torch.equal(result, tensor)
        return
    rows, found = (x.double().view(count * layout[1][1][0], -1) for x in (tensor, result))
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    step = torch.where(low >= 0, high / 255, torch.maximum(-low, high) / 127)
    own = found.abs() * torch.finfo(dtype).eps
    assert ((rows - found).abs() <= step * (0.5 + 1e-4) + own).all()
    assert (found[rows == 0] == 0).all()
    assert ((found * rows >= 0) | (found == 0)).all()


@pytest.mark.parametrize("kind", ENCODINGS)
def test_a_sample_is_kept_the_same_whatever_comes_with_it(kind: str) -> None:
    tensor = values(50, 70, 90, spread=False)  # more than is converted at once
    whole = keep(tensor, kind)
    alone = [keep(tensor[k : k + 1], kind) for k in range(len(tensor))]
    for number, kept in enumerate(whole):
        assert torch.equal(kept, torch.cat([parts[number] for parts in alone]))


@pytest.mark.parametrize("kind", ENCODINGS)
def test_a_large_sample_and_strides_of_any_kind_change_nothing(kind: str) -> None:
    tensor = values(3, 5, 30_000, spread=kind != "float16")
    assert all(
        torch.equal(one, other) for one, other in zip(keep(tensor.mT, kind), keep(tensor.mT.contiguous(), kind), strict=True)
    )
    maps = values(4, 8, 6, 6, spread=False).contiguous(memory_format=torch.channels_last)
    assert torch.equal(back(maps, kind), back(maps.contiguous(), kind))


@pytest.mark.parametrize("kind", ENCODINGS)
def test_values_that_are_not_finite_stay_so(kind: str) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for base in (values(6, 4, 40, spread=False), values(6, 4, 40, spread=False).abs()):
            tensor = base.clone()
            tensor[2, 1, 3] = bad
            result = back(tensor, kind)
            if kind == "int8":
                assert result[2, 1].isnan().all()
                tensor[2, 1] = result[2, 1] = 0
                base[2, 1] = 0
            else:
                assert torch.equal(result[2, 1, 3].isnan(), tensor[2, 1, 3].isnan())
                assert math.isnan(bad) or result[2, 1, 3] == bad
                result[2, 1, 3] = tensor[2, 1, 3] = base[2, 1, 3] = 0
            assert torch.equal(result, back(base, kind))
            assert result.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "dtype", "fits", "beyond", "limit"),
    [
        ("float16", FLOAT32, 65519.0, 65520.0, 65504.0),
        ("bfloat16", FLOAT32, 3.389e38, 3.4e38, 3.3895314e38),
        ("float16", torch.float64, -65519.0, -1e300, 65504.0),
        ("int8", torch.float64, 3e38, 1e300, 3.4028235e38),
    ],
)
@pytest.mark.parametrize("beside", [0.0, math.nan, -math.inf])
def test_a_finite_value_that_would_become_infinite_is_refused(
    kind: str, dtype: torch.dtype, fits: float, beyond: float, limit: float, beside: float
) -> None:
    tensor = torch.zeros(3, 20, dtype=dtype)
    tensor[0, 1] = beside
    tensor[1, 2] = fits
    keep(tensor, kind)
    tensor[1, 2] = beyond
    with pytest.raises(OverflowFault) as caught:
        keep(tensor, kind)
    assert (caught.value.value, caught.value.limit) == (pytest.approx(beyond), pytest.approx(limit))


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 3e38])
def test_int8_of_the_smallest_and_largest_numbers(size: float) -> None:
    for tensor in (torch.tensor([[0.0, size, size / 2]]), torch.tensor([[0.0, size, -size]])):
        result = back(tensor, "int8")
        assert (result - tensor).abs().max() <= max(size / 200, torch.finfo(FLOAT32).tiny / 2)
        assert result[0, 0] == 0
