"""What convolutions hold beside tensors, against this process's private memory; each measurement in a process of its own."""

import json
import subprocess
import sys

import pytest
import torch

from lowmem_pnn.device.kernel_memory import cached_primitives, scratch_bytes

MEASURE = """
import json, sys, time
import torch
from lowmem_pnn.device.cpu import warm_up
from lowmem_pnn.memory.heap import fix_malloc_thresholds, trim_heap
from lowmem_pnn.memory.process_meter import ProcessMemoryMeter, private_bytes
from lowmem_pnn.device.kernel_memory import scratch_bytes

channels_in, channels_out, size, batch = json.loads(sys.argv[1])
fix_malloc_thresholds(0)
warm_up(torch.device("cpu"))
meter = ProcessMemoryMeter(interval=0.0002)
meter.start()
layer = torch.nn.Conv2d(channels_in, channels_out, 3, padding=1)
x = torch.rand(batch, channels_in, size, size)
highest = 0
for _ in range(5):
    trim_heap()
    before = private_bytes()
    meter.begin_section()
    with torch.no_grad():
        y = layer(x)
    highest = max(highest, meter.peak() - before)
    bytes_ = y.nbytes + scratch_bytes(torch.ops.aten.convolution.default, (x, layer.weight), y)
    del y
print(json.dumps([highest, bytes_]))
"""


@pytest.mark.parametrize("shape", [(64, 128, 56, 16), (512, 1024, 2, 64)], ids=["large maps", "large weights"])
def test_a_convolution_holds_what_is_foreseen(shape: tuple[int, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(shape)], capture_output=True, text=True, check=True)
    measured, foreseen = json.loads(done.stdout)
    assert measured <= foreseen * 1.1 + 2_000_000  # code, and scratch of matrix products
    assert foreseen <= measured * 2


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
