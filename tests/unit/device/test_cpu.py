"""The CPU as a device: the part of a budget that it reserves."""

from lowmem_pnn.units import MEBIBYTE


def test_reserves_grow_with_the_budget() -> None:
    from lowmem_pnn.device import CpuDevice

    assert CpuDevice.reserve_for(MEBIBYTE) == 4 * MEBIBYTE == CpuDevice.reserve_for(128 * MEBIBYTE)
    assert CpuDevice.reserve_for(1 << 30) == 32 * MEBIBYTE
    assert CpuDevice(1 << 30).reserve_bytes == 32 * MEBIBYTE
