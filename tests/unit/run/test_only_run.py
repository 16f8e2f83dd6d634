"""The only run: one GPU of a thread's runs at a time."""

import pytest

from helpers.gpu_driver import MB, Driver
from lowmem_pnn.device import CpuDevice, CudaDevice
from lowmem_pnn.errors import BusyError
from lowmem_pnn.run.only_run import alone_on_gpus


def test_a_run_inside_of_one_on_a_gpu_is_not_on_a_gpu() -> None:
    outer, inner = (CudaDevice(budget * MB, driver=Driver()) for budget in (2_000, 1_000))
    with alone_on_gpus(CpuDevice(MB)), alone_on_gpus(outer):
        with (
            pytest.raises(
                BusyError, match=r"^this thread has a run on a GPU, .*: begin it when that has ended, .* or with --device cpu$"
            ),
            alone_on_gpus(inner),
        ):
            pass
        with alone_on_gpus(CpuDevice(MB)):
            pass
    with alone_on_gpus(inner):
        pass
