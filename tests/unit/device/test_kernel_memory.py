"""What convolutions hold beside tensors, against this process's private memory; each measurement in a process of its own."""

import torch

from lowmem_pnn.device.kernel_memory import cached_primitives, scratch_bytes


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
