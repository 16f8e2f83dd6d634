"""Notes on a plan: what is said of a device whose budget is not known to be a wall."""

from helpers.gpu_driver import MB, Driver
from lowmem_pnn.device import CpuDevice, CudaDevice
from lowmem_pnn.planning.notes import device_notes


def test_a_context_that_is_only_assumed_is_said() -> None:
    with CudaDevice(2_000 * MB, driver=Driver("no nvml")) as device:
        assert device_notes(device) == [
            "the driver does not tell what this process holds on the device: 600.0 MB are taken for the CUDA context, libraries included"
        ]
    with CudaDevice(2_000 * MB, driver=Driver("no list")) as device:
        assert device_notes(device) == []
    assert device_notes(CpuDevice(100 * MB)) == []
