"""Setup: products in TF32, which end with the run; one GPU of a thread's runs at a time."""

import pytest
import torch

from helpers.gpu_driver import MB, Driver
from lowmem_pnn.device import CpuDevice, CudaDevice
from lowmem_pnn.errors import BusyError
from lowmem_pnn.training.setup import _alone_on_gpus, tf32_products


def test_a_run_inside_of_one_on_a_gpu_is_not_on_a_gpu() -> None:
    outer, inner = (CudaDevice(budget * MB, driver=Driver()) for budget in (2_000, 1_000))
    with _alone_on_gpus(CpuDevice(MB)), _alone_on_gpus(outer):
        with (
            pytest.raises(
                BusyError, match=r"^this thread has a run on a GPU, .*: begin it when that has ended, .* or with --device cpu$"
            ),
            _alone_on_gpus(inner),
        ):
            pass
        with _alone_on_gpus(CpuDevice(MB)):
            pass
    with _alone_on_gpus(inner):
        pass


def test_tf32_is_the_runs_and_not_the_processs() -> None:
    before = torch.get_float32_matmul_precision()
    with tf32_products(False):
        assert torch.get_float32_matmul_precision() == before
    with tf32_products(True):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
