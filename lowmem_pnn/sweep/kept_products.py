"""Kept products: outputs of the first forward that the forward before a backward takes back instead of computing them again.

    first forward    x --[norm]--[matrix product]--[gelu]--[matrix product]-->      products go to a file as they are computed
    second forward   x --[norm]--[    taken     ]--[gelu]--[    taken     ]-->      with a graph, for the backward

What is cheap for its size (norms, activations, additions) is computed again: it would take longer to move. The products are taken
below autograd, which records them as always, with the tensors that it saves: every gradient is the same, bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_pnn.device import Device
from lowmem_pnn.profiling.costs import Product
from lowmem_pnn.profiling.products import cost_of, is_product
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.scratch import Scratch
from lowmem_pnn.sweep.recompute import called_by

Key = tuple[int, int]
"""Number of a layer, and of a micro-batch."""


class KeptProducts:
    """The kept products of one batch.

    Args:
        device: training device, open.
        folder: folder in which the file is made; it has no name there.
        counter: counter of the bytes written to disk and read.
        layers: numbers of the layers whose products are kept.
        is_kept: decides which of their products are.
    """

    def __init__(
        self, device: Device, folder: Path, counter: IoCounter, layers: Sequence[int], is_kept: Callable[[Product], bool]
    ) -> None:
        self._device = device
        # In the file alone: its pages are in the system's cache, where there is room.
        self._scratch = Scratch(folder, 0, counter)
        self._layers, self._is_kept = frozenset(layers), is_kept
        # The operations whose outputs are kept, in their order; None for a product that is computed again.
        self._operations: dict[Key, list[Any]] = {}

    @contextmanager
    def keeping(self, layer: int, number: int, unneeded: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Keep the products of a layer's first forward.

        Args:
            layer: number of the layer.
            number: number of the micro-batch.
            unneeded: modules whose products no gradient depends on; they are not kept, and are not computed a second time.
        """
        if layer not in self._layers:
            yield
            return
        operations = self._operations[layer, number] = []
        mode = _Keeping(self._is_kept, operations, lambda tensors: self._put((layer, number, len(operations)), tensors))
        with mode, called_by(unneeded, mode.call_paused):
            yield

    @contextmanager
    def taking(self, layer: int, number: int) -> Iterator[None]:
        """Have a layer's second forward take the products that the first one kept, and forget them; without any it computes them.

        Args:
            layer: number of the layer.
            number: number of the micro-batch.
        """
        operations = self._operations.pop((layer, number), None)
        if operations is None:
            yield
            return
        with _Taking(operations, lambda place: self._pop((layer, number, place))):
            yield

    def clear(self) -> None:
        """Forget everything, at the end of a batch; the file stays for the next one."""
        self._operations.clear()
        self._scratch.clear()

    def close(self) -> None:
        """Forget everything, and give the file's room back."""
        self._operations.clear()
        self._scratch.close()

    def _put(self, key: tuple[int, int, int], tensors: Sequence[Tensor | None]) -> None:
        self._scratch.put(key, [None if tensor is None else self._device.to_host(tensor) for tensor in tensors])

    def _pop(self, key: tuple[int, int, int]) -> list[Tensor | None]:
        return [None if tensor is None else self._device.to_device(tensor) for tensor in self._scratch.pop(key)]


class _Keeping(TorchDispatchMode):
    """Keeps the outputs of products. It works below autograd."""

    def __init__(
        self,
        is_kept: Callable[[Product], bool],
        operations: list[Any],
        put: Callable[[Sequence[Tensor | None]], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_paused = False
        self._is_kept, self._operations, self._put = is_kept, operations, put

    def call_paused(self, forward: Callable[..., Any], *tensors: Tensor) -> Any:
        """Call a forward, and keep nothing of it."""
        self._is_paused = True
        try:
            return forward(*tensors)
        finally:
            self._is_paused = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._is_paused or not is_product(func, args, kwargs or {}):
            return result
        if not self._is_kept(cost_of(func, args, result)):
            self._operations.append(None)
            return result
        parts = (result,) if isinstance(result, Tensor) else tuple(result)
        self._put([part if isinstance(part, Tensor) else None for part in parts])
        # What is no tensor (sizes, of which a kernel tells) is kept as it is.
        others = tuple(None if isinstance(part, Tensor) else part for part in parts)
        self._operations.append((func, others, isinstance(result, Tensor)))
        return result


class _Taking(TorchDispatchMode):
    """Returns kept outputs in the place of products, in the order in which they were kept."""

    def __init__(self, operations: Sequence[Any], take: Callable[[int], Sequence[Tensor | None]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations, self._take, self._place = operations, take, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not is_product(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        place, self._place = self._place, self._place + 1
        kept = self._operations[place]
        if kept is None:
            return func(*args, **(kwargs or {}))
        kept_func, others, is_one = kept
        assert kept_func is func, "a layer's second forward does what its first one did"
        parts = self._take(place)
        if is_one:
            return parts[0]
        return tuple(other if part is None else part for part, other in zip(parts, others, strict=True))
