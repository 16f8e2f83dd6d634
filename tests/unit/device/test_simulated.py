"""The simulated device: what is above its capacity fails, and its peaks stay."""

import pytest
import torch

from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.device.budget import OverBudget


def test_a_simulated_device_fails_above_its_capacity_and_keeps_its_peaks() -> None:
    device = SimulatedDevice(10_000, 4_000)
    with device:
        x = device.to_device(torch.zeros(500))
        with pytest.raises(torch.OutOfMemoryError, match=r"asked for 2\.4 kB where 2\.0 kB of 4\.0 kB are in use"):
            torch.zeros(600)
        assert (device.used_bytes(), device.peak_bytes <= 4_000) == (2_000, True)
        del x
        device.begin_section()
        assert (device.used_bytes(), device.section_peak_bytes()) == (0, 0)
        device.check_budget()
        device.capacity_bytes = 20_000
        y = torch.zeros(3_000)
        with pytest.raises(OverBudget, match="12000 bytes in use, above the budget of 10000"):
            device.check_budget()
        del y
        device.begin_section()
        # What has no bytes takes none.
        ghosts = torch.zeros(10**6, device="meta"), torch.zeros(10**6, device="meta") + 1
        assert device.used_bytes() == 0
        del ghosts
    assert device.peak_bytes == 12_000
