"""What convolutions hold beside tensors, against this process's private memory; each measurement in a process of its own."""

from typing import Any

import pytest
import torch

from lowmem_pnn.device import kernel_memory
from lowmem_pnn.device.kernel_memory import (
    cached_primitives,
    packing_bytes,
    product_width,
    scratch_bytes,
    untouched_bytes,
    workspace_bytes,
)


def test_only_convolutions_on_the_cpu_count() -> None:
    x, weight = torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3)
    y = torch.zeros(2, 4, 8, 8)
    convolution = torch.ops.aten.convolution.default
    assert scratch_bytes(convolution, (x, weight), y) == x.nbytes + weight.nbytes + y.nbytes
    assert scratch_bytes(convolution, (x.to("meta"), weight.to("meta")), y.to("meta")) == 0
    assert scratch_bytes(torch.ops.aten.mm.default, (x, weight), y) == 0
    assert cached_primitives(torch.ops.aten.mm.default, (x, weight)) == {}


def test_matrix_products_are_compiled_in_bfloat16_alone() -> None:
    x, weight = torch.zeros(4, 3), torch.zeros(3, 5)
    mm = torch.ops.aten.mm.default
    assert cached_primitives(mm, (x, weight)) == cached_primitives(mm, (x.half(), weight.half())) == {}
    [(key, nbytes)] = cached_primitives(mm, (x.bfloat16(), weight.bfloat16())).items()
    assert nbytes > 500_000
    assert cached_primitives(torch.ops.aten.addmm.default, (torch.zeros(5), x.bfloat16(), weight.bfloat16())) == {key: nbytes}
    assert key not in cached_primitives(mm, (x[:2].bfloat16(), weight.bfloat16()))


def test_code_is_shared_by_convolutions_of_one_shape() -> None:
    x, weight, rest = torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3), (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    convolution = torch.ops.aten.convolution.default
    assert cached_primitives(convolution, (x, weight, *rest)) == cached_primitives(
        convolution, (x.clone(), weight.clone(), *rest)
    )
    assert cached_primitives(convolution, (x, weight, *rest)) != cached_primitives(convolution, (x[:1], weight, *rest))
    gradient = torch.zeros(2, 4, 8, 8)
    assert len(cached_primitives(torch.ops.aten.convolution_backward.default, (gradient, x, weight, [0], *rest[1:]))) == 2


def test_packing_goes_by_the_size_of_the_factors() -> None:
    product = torch.ops.aten.mm.default
    assert product_width(product, (torch.empty(16, 1024), torch.empty(1024, 1024))) == 1024
    assert product_width(product, (torch.empty(2, 8192), torch.empty(8192, 5))) == 80
    assert product_width(torch.ops.aten.add.Tensor, (torch.empty(2), torch.empty(2))) == 0
    assert [packing_bytes(width, 2) for width in (0, 1024, 4096)] == [0, 3_200_000, 9_600_000]


def test_kernels_larger_than_their_map_take_memory_that_they_do_not_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.empty(64, 64, 3, 3)

    def arguments(side: int, groups: int = 1) -> tuple[Any, ...]:
        maps = torch.empty(8, 64, side, side)
        kernel = weight[:, : 64 // groups]
        return maps, maps, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups, [True, True, False]

    backward = torch.ops.aten.convolution_backward.default
    results = torch.empty(8, 64, 2, 2), weight, None
    monkeypatch.setattr(kernel_memory, "HAS_AVX512", True)
    assert untouched_bytes(backward, arguments(2)) == 0
    before = scratch_bytes(backward, arguments(2), results)
    monkeypatch.setattr(kernel_memory, "HAS_AVX512", False)
    assert untouched_bytes(backward, arguments(2)) == (4 * torch.get_num_threads() - 2) * weight.nbytes
    assert scratch_bytes(backward, arguments(2), results) == before + weight.nbytes
    assert untouched_bytes(backward, arguments(3)) == untouched_bytes(backward, arguments(2, groups=4)) == 0
    assert untouched_bytes(torch.ops.aten.convolution.default, arguments(2)) == 0


@pytest.mark.parametrize("sizes", [(12, 16, 16, 128), (12, 8, 256, 128), (24, 8, 100, 100), (6, 16, 128, 256)], ids=str)
def test_an_lstms_workspace_is_as_large_as_onednns(sizes: tuple[int, int, int, int]) -> None:
    steps, samples, inputs, hidden = sizes
    x, state = torch.zeros(steps, samples, inputs), torch.zeros(samples, hidden)
    weights = torch.zeros(4 * hidden, inputs), torch.zeros(4 * hidden, hidden), torch.zeros(4 * hidden), torch.zeros(4 * hidden)
    operation = torch.ops.aten.mkldnn_rnn_layer.default
    for trains in (True, False):
        arguments = (x, *weights, state, state, False, [], 2, hidden, 1, True, False, True, trains)
        *_, workspace = operation(*arguments)
        assert workspace_bytes(operation, arguments) == pytest.approx(workspace.nbytes, rel=0.05)
        assert scratch_bytes(operation, arguments, None) > weights[0].nbytes + weights[1].nbytes
    assert workspace_bytes(torch.ops.aten.mm.default, (x, x)) == 0
