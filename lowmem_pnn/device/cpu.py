"""The CPU as the training device: the budget bounds the process's private memory above its floor."""

import gc
import sys

import torch
from torch import nn

from lowmem_pnn.device.base import Device
from lowmem_pnn.memory.process_meter import (
    DataLimit,
    HeapRelief,
    ProcessMemoryMeter,
    fix_malloc_thresholds,
    private_bytes,
    trim_heap,
    trim_threshold,
)


class CpuDevice(Device):
    """This process, with a wall of RLIMIT_DATA a reserve above the budget.

    Args:
        budget_bytes: private memory (RssAnon + RssShmem) above the floor that the process may hold.
    """

    kind = "cpu"
    shares_host = True

    def __init__(self, budget_bytes: int) -> None:
        super().__init__(torch.device("cpu"), budget_bytes)
        self._wall = DataLimit(budget_bytes + self.reserve_bytes)
        self._relief = HeapRelief(sys.maxsize)
        self._meter = ProcessMemoryMeter(on_sample=self._follow)

    @staticmethod
    def slack_for(budget_bytes: int) -> int:
        """The heap's free end, and holes between tensors: a sixteenth. Measured: 6 to 14 MB with a budget of 300 MB."""
        return 4 * trim_threshold(budget_bytes)

    def open(self) -> None:
        """Warm up with a tiny training step, then take the floor and raise the wall."""
        fix_malloc_thresholds(self.budget_bytes)
        self._meter.start()
        warm_up(self.torch_device)
        gc.collect()  # garbage in the floor would be room above the budget
        trim_heap()
        self.floor_bytes = private_bytes()
        self.expect(self.budget_bytes)
        self._wall.raise_wall()
        # What was collected a moment ago is in no section.
        self._meter.begin_section()

    def close(self) -> None:
        """Take the wall down and stop the meter."""
        self._peak = self.peak_bytes
        self._meter.stop()
        self._wall.take_down()

    def expect(self, peak_bytes: int) -> None:
        """See `Device.expect`; a plan counts the heap's slack as used, which is where holes are to be given back."""
        self._relief.set_level(self.floor_bytes + peak_bytes - self.slack_for(self.budget_bytes))

    def _follow(self, private: int, data: int) -> None:
        self._wall.follow(private, data)
        self._relief.follow(private)

    def used_bytes(self) -> int:
        """Private memory now, above the floor."""
        return private_bytes() - self.floor_bytes

    def section_peak_bytes(self) -> int:
        """The section's highest private memory, above the floor."""
        return max(0, self._meter.peak() - self.floor_bytes)

    def synchronize(self) -> None:
        """Nothing is left to be done when a call returns."""

    def begin_section(self) -> None:
        """Start a new stretch for `section_peak_bytes`."""
        self._peak = max(self._peak, self.section_peak_bytes())
        self._meter.begin_section()

    def release(self) -> None:
        """Give the heap's free pages back."""
        trim_heap()


def warm_up(device: torch.device) -> None:
    """A tiny training step, so that what libraries allocate once (thread pools, handles, lazily imported modules) is in the floor.

    Args:
        device: where to run it.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 8)).to(
            device
        )
        for optimizer_type in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
            optimizer = optimizer_type(model.parameters(), lr=1e-3, fused=True)
            loss = nn.functional.cross_entropy(
                model(torch.ones(2, 3, 8, 8, device=device)), torch.zeros(2, dtype=torch.int64, device=device)
            )
            torch.autograd.backward(loss)
            optimizer.step()
        model.eval()(torch.ones(1, 3, 8, 8, device=device))
