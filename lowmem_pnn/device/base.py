"""What every device offers: a budget, a floor, a meter of what is used above it, and copies to and from it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import ClassVar

import torch
from torch import Tensor

from lowmem_pnn.device.transfers import Download, Transfers, Upload
from lowmem_pnn.memory.aligned import Empty
from lowmem_pnn.units import MEBIBYTE

# How libraries below us say that memory ran out without raising torch.OutOfMemoryError. oneDNN reports a failed allocation as a
# primitive that cannot be made; on Jetson the caching allocator's NVML query fails instead of the allocation.
_OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "could not create a primitive",
    "could not create a memory object",
    "could not execute a primitive",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "NVML_SUCCESS == r INTERNAL ASSERT",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: the one place that knows.

    Args:
        error: whatever a computation or an allocation raised.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


class OverBudget(MemoryError):
    """The meter saw more than the budget: treated as running out of memory, before the wall does it."""


class Device(ABC):
    """A training device inside a budget of bytes.

    Used as a context: entering takes the floor and raises the wall, leaving takes the wall down. Everything that is to count as floor
    (imports, the data source, threads) must be there before.
    """

    kind: ClassVar[str]
    # Whether tensors on the host count against the budget: where host and device are one.
    shares_host: ClassVar[bool] = False

    def __init__(self, torch_device: torch.device, budget_bytes: int) -> None:
        self.torch_device = torch_device
        self.budget_bytes = budget_bytes
        self.floor_bytes = 0
        self._section_peak = 0
        self._peak = 0
        # Copies beside the computing, while it is open; None where host and device are one.
        self.transfers: Transfers | None = None

    @staticmethod
    def reserve_for(budget_bytes: int) -> int:
        """What plans leave free of a budget for what they cannot foresee: a thirty-second of it, at least 4 MiB."""
        return max(4 * MEBIBYTE, budget_bytes // 32)

    @property
    def reserve_bytes(self) -> int:
        """`reserve_for` this device's budget."""
        return self.reserve_for(self.budget_bytes)

    @staticmethod
    def slack_for(budget_bytes: int) -> int:
        """What the allocator holds beside tensors with a budget: free memory that it does not give back."""
        return 0

    @property
    def fixed_bytes(self) -> int:
        """What is in use above the floor before anything is trained: a CUDA context, else nothing."""
        return 0

    @abstractmethod
    def open(self) -> None:
        """Take the floor, start the meter, raise the wall."""

    @abstractmethod
    def close(self) -> None:
        """Take the wall down and stop the meter; the peaks stay readable."""

    @abstractmethod
    def used_bytes(self) -> int:
        """What is in use now, above the floor."""

    @abstractmethod
    def section_peak_bytes(self) -> int:
        """The most that was in use since `begin_section`, above the floor."""

    @abstractmethod
    def begin_section(self) -> None:
        """Start a new stretch for `section_peak_bytes`."""

    @property
    def peak_bytes(self) -> int:
        """The most that was in use since the device was opened, above the floor."""
        self._peak = max(self._peak, self.section_peak_bytes())
        return self._peak

    @property
    def host_peak_bytes(self) -> int:
        """The most private host memory above what the process held when the device was opened."""
        return self.peak_bytes

    def expect(self, peak_bytes: int) -> None:  # noqa: B027 - most devices need not be told
        """What comes is foreseen to need no more than this, above the floor: what is freed may be kept below it for further use.

        Args:
            peak_bytes: as planned.
        """

    def check_budget(self) -> None:
        """Raise if the present section went over the budget.

        Raises:
            OverBudget: it did; `is_out_of_memory` knows it.
        """
        if (found := self.section_peak_bytes()) > self.budget_bytes:
            raise OverBudget(f"{found} bytes in use, above the budget of {self.budget_bytes}")

    @abstractmethod
    def release(self) -> None:
        """Give freed memory back to the system, so that the meter and the wall no longer see it."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all that was asked of it is done."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the device, 64-byte aligned."""
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def to_device(self, tensor: Tensor) -> Tensor:
        """A host tensor on the device; the same tensor where host and device are one.

        The host does not wait for the copy, and may write to its tensor at once.
        """
        if self.shares_host:
            return tensor
        assert self.transfers is not None, "the device is open"
        (placed,) = self.transfers.to_device((tensor,))
        return placed

    def upload(self, tensors: Sequence[Tensor]) -> Upload | None:
        """Begin to bring host tensors up for later use; None where that is to be done when they are needed.

        Args:
            tensors: not written to before they are taken.
        """
        return None if self.transfers is None else self.transfers.upload(tensors)

    def to_host(self, tensor: Tensor) -> Tensor:
        """A device tensor on the host, in memory of its own; the same tensor where host and device are one."""
        return tensor if self.shares_host else tensor.cpu()

    def download(self, tensor: Tensor) -> Download:
        """Begin to bring a device tensor down; the same tensor, at once, where host and device are one.

        Args:
            tensor: must not change before the copy is waited for. What comes is lent: it is not kept for long.
        """
        return Download(tensor) if self.transfers is None else self.transfers.download(tensor)

    def settle(self) -> None:
        """Wait until no copy is under way, after which no memory is held for one that nobody takes."""
        if self.transfers is not None:
            self.transfers.settle()

    def host_empty(self) -> Empty | None:
        """Makes host tensors that are to be filled and placed; None for fresh memory."""
        return None if self.transfers is None else self.transfers.empty

    def random_state(self) -> tuple[Tensor, ...]:
        """The state of every generator that a forward may draw from, on the host."""
        return (torch.get_rng_state(),)

    def set_random_state(self, state: tuple[Tensor, ...]) -> None:
        """Go back to what `random_state` gave."""
        torch.set_rng_state(state[0])

    def describe(self) -> str:
        """The device's name, for people."""
        return str(self.torch_device)

    def __enter__(self) -> "Device":
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
