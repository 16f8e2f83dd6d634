"""The CPU as the training device: the budget bounds the private memory of the process above its floor."""

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lowmem_pnn.device.base import Device
from lowmem_pnn.device.budget import DataLimit, OverBudget
from lowmem_pnn.errors import BudgetError
from lowmem_pnn.memory.heap import HeapTrimmer, fix_malloc_thresholds, trim_heap, trim_threshold
from lowmem_pnn.memory.process_meter import ProcessMemoryMeter, private_bytes
from lowmem_pnn.memory.relief import add_relief, remove_relief
from lowmem_pnn.memory.tunables import has_tidy_heap
from lowmem_pnn.units import format_bytes


class CpuDevice(Device):
    """This process, with RLIMIT_DATA set at the budget once a plan is there.

    Args:
        budget_bytes: private memory (RssAnon + RssShmem) above the floor that the process may hold.
    """

    kind = "cpu"
    shares_host = True

    def __init__(self, budget_bytes: int) -> None:
        super().__init__(torch.device("cpu"), budget_bytes)
        self._limit = DataLimit()
        self._trimmer = HeapTrimmer(sys.maxsize)
        # Thread whose private memory the meter bounds, and what it found above the budget, in bytes.
        self._watched: int | None = None
        self._over = 0
        self._meter = ProcessMemoryMeter(on_sample=self._use_sample)

    @staticmethod
    def slack_for(budget_bytes: int, heap_bytes: int | None = None) -> int:
        """Return the size of the heap's free end, and of holes between tensors: a sixteenth of the budget.

        Measured: 6 to 14 MB with a budget of 300 MB. Holes are where tensors were, so they are not larger than what was in the heap.
        """
        free_end = trim_threshold(budget_bytes)
        return 4 * free_end if heap_bytes is None else min(4 * free_end, free_end + heap_bytes)

    def open(self) -> None:
        """Warm up with a tiny training step, then measure the floor."""
        fix_malloc_thresholds(self.budget_bytes)
        self._meter.start()
        warm_up(self.torch_device)
        gc.collect()  # garbage in the floor would be room above the budget
        trim_heap()
        self.floor_bytes = private_bytes()
        self.set_expected_peak(self.budget_bytes)
        # The garbage that was collected a moment ago is in no section.
        self._meter.begin_section()

    def enforce(self, untouched_bytes: int = 0) -> None:
        """See `Device.enforce`: an allocation that would pass the floor by more than the budget fails."""
        trim_heap()  # of what making the plan has left
        self._limit.set(self.floor_bytes + self.budget_bytes + untouched_bytes)
        remove_relief(self._give_back)
        add_relief(self._give_back)

    @contextmanager
    def metered(self) -> Iterator[None]:
        """See `Device.metered`: an exception is raised in this thread where the meter finds more in use than the budget."""
        self._over, self._watched = 0, threading.get_ident()
        error: OverBudget | None = None
        try:
            with self._limit.lifted():
                yield
                # What was raised by the meter comes with some call of Python's, and not after the context.
                self._watched = None
                time.sleep(0)
        except OverBudget as over:
            error = over
        finally:
            self._watched = None
        if self._over or error is not None:
            raise BudgetError(
                f"building the model takes {format_bytes(self._over)} of private memory or more, above the budget of "
                f"{format_bytes(self.budget_bytes)}; map its weights (from_pretrained of safetensors, torch.load(mmap=True)), give the model "
                "as hf:DIR, or a larger --max-gpu-mem"
            ) from error

    def close(self) -> None:
        """Lift the memory limit and stop the meter."""
        self._peak = self.peak_bytes
        self._meter.stop()
        remove_relief(self._give_back)
        self._limit.restore()

    def set_expected_peak(self, peak_bytes: int) -> None:
        """See `Device.set_expected_peak`; a plan counts the heap's slack as used, so the heap is trimmed from that much below."""
        self._trimmer.set_level(self.floor_bytes + peak_bytes - self.slack_for(self.budget_bytes))

    def _use_sample(self, private: int, data: int) -> None:
        self._limit.adjust(private, data)
        if self._watched is not None and private - self.floor_bytes > self.budget_bytes:
            self._over, watched, self._watched = private - self.floor_bytes, self._watched, None
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(watched), ctypes.py_object(OverBudget))
        if freed := self._trimmer.trim_above_level(private):
            self._limit.note_freed(freed)

    def used_bytes(self) -> int:
        """Return the private memory now, above the floor."""
        return private_bytes() - self.floor_bytes

    def section_peak_bytes(self) -> int:
        """Return the highest private memory of the section, above the floor."""
        return max(0, self._meter.peak() - self.floor_bytes)

    def synchronize(self) -> None:
        """Do nothing: all is done when a call returns."""

    def begin_section(self) -> None:
        """Begin a section: `section_peak_bytes` starts anew."""
        self._peak = max(self._peak, self.section_peak_bytes())
        self._meter.begin_section()

    def release(self) -> None:
        """Give the heap's free pages back."""
        trim_heap()

    def release_for_next(self) -> None:
        """Give the heap's free pages back, where it is tidy as `keep_to_expected_peak` does: what comes next uses the others."""
        if has_tidy_heap():
            self.keep_to_expected_peak()
        else:
            self.release()

    def keep_to_expected_peak(self) -> None:
        """See `Device.keep_to_expected_peak`; the meter's thread does so too, but it may come late on a busy machine."""
        if has_tidy_heap() and self._trimmer.is_above_level(private_bytes()):
            self._give_back()

    def _give_back(self) -> int:
        """Give the heap's free pages back, have the limit know of it at once, and return how many bytes it was."""
        private = private_bytes()
        self.release()
        freed = max(0, private - private_bytes())
        self._limit.note_freed(freed)
        return freed


def warm_up(device: torch.device) -> None:
    """Run a tiny training step, so that one-time allocations (thread pools, handles, lazily imported modules) are in the floor.

    Args:
        device: device to run the step on.
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
