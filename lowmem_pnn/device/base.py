"""The interface of every training device: its budget, a meter of the memory in use, copies to and from it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import ClassVar

import torch
from torch import Tensor

from lowmem_pnn.device.budget import check_peak, reserve_bytes_of
from lowmem_pnn.device.buffers import BufferSizes
from lowmem_pnn.device.transfers import Download, Transfers, Upload
from lowmem_pnn.memory.aligned import HostAllocator


class Device(ABC):
    """A training device inside a budget of bytes.

    Used as a context: entering measures the floor, `enforce` sets the memory limit, leaving lifts it. The *floor* is the memory that
    the process holds before training, and no part of the budget. Everything that is to count as floor (imports, the data source,
    threads) must be there before.
    """

    kind: ClassVar[str]
    # Whether tensors on the host count against the budget: where host and device are one.
    shares_host: ClassVar[bool] = False

    def __init__(self, torch_device: torch.device, budget_bytes: int) -> None:
        self.torch_device = torch_device
        self.budget_bytes = budget_bytes
        self.floor_bytes = 0
        self._peak = 0
        # Copies beside the computing, while the device is open; None where host and device are one.
        self.transfers: Transfers | None = None

    @staticmethod
    def reserve_for(budget_bytes: int) -> int:
        """Return the part of a budget that plans keep free: see `budget.reserve_bytes_of`."""
        return reserve_bytes_of(budget_bytes)

    @property
    def reserve_bytes(self) -> int:
        """The part of this device's budget that plans keep free."""
        return self.reserve_for(self.budget_bytes)

    @staticmethod
    def slack_for(budget_bytes: int, heap_bytes: int | None = None) -> int:
        """Return how much freed memory the allocator keeps under a budget instead of giving it back.

        Args:
            budget_bytes: the budget.
            heap_bytes: most bytes in use that come from the heap, where only that keeps freed memory; None for any number.
        """
        return 0

    @property
    def buffer_sizes(self) -> BufferSizes:
        """Sizes of the buffers between disk, host and this device."""
        return BufferSizes.of_budget(self.budget_bytes)

    @property
    def fixed_bytes(self) -> int:
        """Memory in use above the floor before training: a CUDA context, else nothing."""
        return 0

    @property
    def context(self) -> dict[str, int | str]:
        """What a CUDA context holds, in `bytes`, and how that was `found`; empty on other devices."""
        return {}

    @property
    def spills(self) -> bool:
        """Whether a full device moves memory elsewhere, and goes on slowly, instead of refusing an allocation."""
        return False

    @property
    def is_unified(self) -> bool:
        """Whether the device is another one than the CPU, and takes the host's memory."""
        return False

    @abstractmethod
    def open(self) -> None:
        """Measure the floor, and start the meter."""

    def enforce(self, untouched_bytes: int = 0) -> None:  # noqa: B027 - a device whose limit stands from its opening on has nothing to do
        """Set the memory limit, if it is not set: from now on an allocation above the budget fails. A plan is made before that.

        Args:
            untouched_bytes: most bytes that a kernel takes from the system without using them, for which the limit leaves room.
        """

    @contextmanager
    def metered(self) -> Iterator[None]:
        """Return a context for a user's constructor, in which host memory is bounded by the meter, and not by an operating-system limit.

        A limit counts private mappings of files, as `from_pretrained` and `torch.load(mmap=True)` make them, as if they were in use.

        Raises:
            BudgetError: more private memory was in use than the budget.
        """
        yield

    @abstractmethod
    def close(self) -> None:
        """Lift the memory limit and stop the meter; the peaks stay readable."""

    @abstractmethod
    def used_bytes(self) -> int:
        """Return the memory in use now, above the floor."""

    @abstractmethod
    def section_peak_bytes(self) -> int:
        """Return the highest memory use since `begin_section`, above the floor."""

    @abstractmethod
    def begin_section(self) -> None:
        """Begin a section: `section_peak_bytes` starts anew."""

    @property
    def peak_bytes(self) -> int:
        """The highest memory use since the device was opened, above the floor."""
        self._peak = max(self._peak, self.section_peak_bytes())
        return self._peak

    @property
    def host_peak_bytes(self) -> int:
        """The highest private host memory above the amount in use when the device was opened."""
        return self.peak_bytes

    def set_expected_peak(self, peak_bytes: int) -> None:  # noqa: B027 - most devices need not be told
        """Announce the predicted peak of the next computations: freed memory may be kept for further use up to it.

        Args:
            peak_bytes: predicted peak, above the floor.
        """

    def check_budget(self) -> None:
        """Check the peak of the present section against the budget.

        Raises:
            OverBudget: the peak is above the budget; `is_out_of_memory` recognises it.
        """
        check_peak(self.section_peak_bytes(), self.budget_bytes)

    @abstractmethod
    def release(self) -> None:
        """Give freed memory back to the system, so that the meter and the memory limit no longer count it."""

    def release_for_next(self) -> None:  # noqa: B027 - another device's allocator keeps freed memory for what comes next
        """Give freed memory back between two partitions of a batch, as far as the next one cannot use it."""

    def keep_to_expected_peak(self) -> None:  # noqa: B027 - another device's allocator knows what is free
        """Give freed memory back where more is in use than expected; called between layers."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all computations and copies that were asked for are done."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Make an uninitialised tensor on the device, 64-byte aligned."""
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a host tensor to the device, or return it where host and device are one.

        The host does not wait for the copy, and may write to its tensor at once.
        """
        if self.shares_host:
            return tensor
        assert self.transfers is not None, "the device is open"
        (on_device,) = self.transfers.to_device((tensor,))
        return on_device

    def upload(self, tensors: Sequence[Tensor]) -> Upload | None:
        """Begin to copy host tensors to the device for later use.

        Args:
            tensors: host tensors that nobody writes to until `Upload.get` or `Upload.close`.

        Returns:
            The upload; None where `to_device` is to be used when the tensors are needed: host and device are one, or too much is in
            flight.
        """
        return None if self.transfers is None else self.transfers.upload(tensors)

    def to_host(self, tensor: Tensor) -> Tensor:
        """Copy a device tensor to host memory of its own, or return it where host and device are one."""
        return tensor if self.shares_host else tensor.cpu()

    def download(self, tensor: Tensor) -> Download:
        """Begin to copy a device tensor to the host; the download is that tensor, and done, where host and device are one.

        Args:
            tensor: device tensor that must not change before the copy was waited for. Its host copy is lent: it is not kept for long.
        """
        return Download(tensor) if self.transfers is None else self.transfers.download(tensor)

    def finish_transfers(self) -> None:
        """Wait until no copy is in flight; memory of copies that nobody took is then free."""
        if self.transfers is not None:
            self.transfers.finish()

    def host_allocator(self) -> HostAllocator | None:
        """Return the function that makes host tensors which are to be copied to the device; None for fresh memory."""
        return None if self.transfers is None else self.transfers.empty

    def random_state(self) -> tuple[Tensor, ...]:
        """Return the state of every generator that a forward may draw from, on the host."""
        return (torch.get_rng_state(),)

    def set_random_state(self, state: tuple[Tensor, ...]) -> None:
        """Restore a state that `random_state` returned."""
        torch.set_rng_state(state[0])

    def describe(self) -> str:
        """Return the device's name, for people."""
        return str(self.torch_device)

    def __enter__(self) -> "Device":
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
