"""Devices: what a memory budget means on each, how its use is measured, and the wall that enforces it."""

from lowmem_pnn.device.base import Device, is_out_of_memory
from lowmem_pnn.device.cpu import CpuDevice
from lowmem_pnn.device.cuda import CudaDevice
from lowmem_pnn.device.simulated import SimulatedDevice
from lowmem_pnn.device.transfers import Download

__all__ = ["CpuDevice", "CudaDevice", "Device", "Download", "SimulatedDevice", "is_out_of_memory"]
