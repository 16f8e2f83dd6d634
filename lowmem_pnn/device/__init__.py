"""Training devices: the memory budget and its enforcement, meters of the memory in use, copies between host and device."""

from lowmem_pnn.device.base import Device
from lowmem_pnn.device.budget import OverBudget, is_out_of_memory, why_it_failed
from lowmem_pnn.device.cpu import CpuDevice
from lowmem_pnn.device.cuda import CudaDevice
from lowmem_pnn.device.simulated import SimulatedDevice
from lowmem_pnn.device.transfers import Download

__all__ = ["CpuDevice", "CudaDevice", "Device", "Download", "OverBudget", "SimulatedDevice", "is_out_of_memory", "why_it_failed"]
