"""A counter of live tensors' bytes, real or fake, that can refuse to exceed a capacity: `StorageTracker`."""

import threading
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from lowmem_pnn.dispatch_mode import DispatchMode, asked_device
from lowmem_pnn.units import format_bytes

_Tracker = TypeVar("_Tracker", bound="StorageTracker")

# torch.tensor() makes its storage outside the dispatcher, which first sees it as the argument of one of these operations.
_FRESH = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default)


class StorageTracker(DispatchMode):
    """A mode that counts the storages made while it is active, from the operation that makes one until its last reference goes.

    A storage counts once however many tensors view it. Storages made before entering do not count, and neither do temporaries that a
    kernel allocates and frees inside. Fake tensors (`FakeTensorMode` entered before this) count as many bytes as real ones. A
    counted storage stays counted after leaving, until it is freed; entering again resumes counting.

    Args:
        capacity_bytes: most live bytes; an operation whose result would exceed them raises, as on a full device. None for no limit.
        fake: whether tensors without bytes (fake, on the meta device) count as many bytes as real ones.

    Example:
        >>> with StorageTracker() as tracker:
        ...     x = torch.zeros(256)
        ...     y = x.view(16, 16) + 1
        ...     del x
        >>> tracker.live, tracker.peak
        (1024, 2048)
    """

    def __init__(self, capacity_bytes: int | None = None, *, fake: bool = True) -> None:
        super().__init__()
        self._fake = fake
        self.capacity_bytes = capacity_bytes
        self._live = 0
        self._peak = 0
        # By id of the storage's Python object, which lives as long as the storage does: a weak reference and the size counted for
        # it.
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        # Reentrant: a storage may be freed, in this thread, while its sibling is being counted.
        self._lock = threading.RLock()

    @property
    def live(self) -> int:
        """Bytes of all counted storages that are alive."""
        return self._live

    @property
    def peak(self) -> int:
        """The most bytes that were alive since `reset_peak`, or since the first entering."""
        return self._peak

    def reset_peak(self) -> None:
        """Start `peak` anew, at the bytes that are alive now."""
        with self._lock:
            self._peak = self._live

    def __enter__(self: _Tracker) -> _Tracker:
        """Start counting."""
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop counting new storages."""
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and count the storages that it made.

        Raises:
            torch.OutOfMemoryError: the new storages would take the live bytes above the capacity; the result is freed.
        """
        if (device := asked_device(func, args)) is not None:
            return device
        kwargs = kwargs or {}
        result = self._call(func, args, kwargs)
        if not isinstance(result, Tensor | tuple | list):
            return result  # a question
        given = set() if func in _FRESH else {id(storage) for storage in self._storages((args, kwargs))}
        added = 0
        # An argument may have been resized in place, so known storages are looked at again.
        results = {id(storage): storage for storage in self._storages(result)}
        for key, storage in results.items():
            if key in self._known:
                added += storage.nbytes() - self._known[key][1]
            elif key not in given:
                added += storage.nbytes()
        if self.capacity_bytes is not None and added > 0 and self._live + added > self.capacity_bytes:
            # The exception's traceback holds this frame: without `del` the refused result would outlive the refusal.
            message = (
                f"out of memory: {func} asked for {format_bytes(added)} where {format_bytes(self._live)} of "
                f"{format_bytes(self.capacity_bytes)} are in use"
            )
            del result, results, storage
            raise torch.OutOfMemoryError(message)
        for key, storage in results.items():
            if key in self._known or key not in given:
                self._count(key, storage)
        with self._lock:
            self._peak = max(self._peak, self._live)
        self._after_operation(func, args, result)
        return result

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation; a subclass that knows more of its results than fake tensors show overrides this."""
        return func(*args, **kwargs)

    def _after_operation(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Do nothing; a subclass that measures more than the peak overrides this, and is called after every operation."""

    def _count(self, key: int, storage: torch.UntypedStorage) -> None:
        with self._lock:
            size = storage.nbytes()
            if key in self._known:
                reference, before = self._known[key]
                self._live -= before
            else:
                reference = weakref.ref(storage, self._forget(key))
            self._known[key] = (reference, size)
            self._live += size

    def _forget(self, key: int) -> Callable[[object], None]:
        known, lock, tracker = self._known, self._lock, weakref.ref(self)

        def forget(_: object) -> None:
            with lock:
                _, size = known.pop(key)
                if (alive := tracker()) is not None:
                    alive._live -= size

        return forget

    def _storages(self, tree: Any) -> Iterable[torch.UntypedStorage]:
        """Yield the storages of the strided tensors in nested lists, tuples and dicts; sparse tensors have none."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and (self._fake or _is_real(leaf)):
                yield leaf.untyped_storage()


def _is_real(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)
