"""What crosses the partitions while a batch goes forward and back: kept by micro-batch in the scratch store.

forward     boundary activations, and random states where a partition draws from a generator
backward    gradients of boundaries, and of weights that an earlier partition has too
to a step   whole gradients, where all of them have to be there first
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowmem_pnn.device import Device, Download
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.seeds import seed_of
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.scratch import Scratch

Key = tuple[str, int | str, int]
Hooks = list[torch.utils.hooks.RemovableHandle]


class BoundaryBuffers:
    """Tensors come from the device and go back to it; in between they are on the host, or on disk.

    Args:
        device: open.
        folder: where the scratch store's file may be.
        memory_bytes: of tensors that are kept in memory.
        counter: of the bytes written to disk and read.
        seed: of the run.
        phase: a word that random choices follow from.
    """

    def __init__(self, device: Device, folder: Path, memory_bytes: int, counter: IoCounter, seed: int, phase: str) -> None:
        self._device = device
        self._scratch = Scratch(folder, memory_bytes, counter)
        self._seed = seed
        self._phase = phase
        # What was put last, and is still on its way from a device that copies beside its computing.
        self._behind: tuple[Key, list[Download | None]] | None = None

    def put_boundary(self, boundary: int, number: int, tensors: Sequence[Tensor]) -> None:
        """Keep the activations of a micro-batch that flow into partition `boundary`."""
        self._put(("boundary", boundary, number), [tensor.detach() for tensor in tensors])

    def boundary(self, boundary: int, number: int) -> tuple[Tensor, ...]:
        """Those activations, on the host: leaves of a new graph once they are placed."""
        kept = self._with(("boundary", boundary, number)).get(("boundary", boundary, number))
        # Detached once more: a tensor may be kept for two boundaries, and needs a gradient for one of them at a time.
        return tuple(tensor.detach() for tensor in kept if tensor is not None)

    def drop_boundary(self, boundary: int, number: int) -> None:
        """They are not needed any more."""
        key = ("boundary", boundary, number)
        self._with(key).drop(key)

    def put_gradients(self, boundary: int, number: int, gradients: Sequence[Tensor | None]) -> None:
        """Keep the gradients of a boundary's tensors; None where a tensor has none."""
        self._put(("gradient", boundary, number), gradients)

    def pop_gradients(self, boundary: int, number: int) -> tuple[Tensor | None, ...]:
        """Those gradients, on the device, once."""
        key = ("gradient", boundary, number)
        return tuple(self._to_device_or_none(tensor) for tensor in self._with(key).pop(key))

    def begin_random(self, partition: int, number: int, step: int) -> tuple[Tensor, ...]:
        """Bring the generators to where they were when a micro-batch came to a partition, and return their state.

        Args:
            partition: to run.
            number: of the micro-batch.
            step: optimizer steps before.
        """
        for before in range(partition, 0, -1):
            if ("random", before, number) in self._scratch:
                state = tuple(tensor for tensor in self._scratch.get(("random", before, number)) if tensor is not None)
                self._device.set_random_state(state)
                return state
        torch.manual_seed(seed_of(self._seed, self._phase, 0, step, number))
        return self._device.random_state()

    def end_random(self, partition: int, number: int, began: tuple[Tensor, ...]) -> None:
        """Keep where the generators are after a partition, if it drew from them.

        Args:
            partition: that ran.
            number: of the micro-batch.
            began: what `begin_random` returned.
        """
        state = self._device.random_state()
        if any(not torch.equal(one, other) for one, other in zip(began, state, strict=True)):
            self._scratch.put(("random", partition + 1, number), state)

    def add_shared(self, residency: Residency, number: int) -> Hooks:
        """Have later partitions' gradients of shared parameters added to this one's, as autograd does in the whole model.

        Args:
            residency: about to run a micro-batch.
            number: of the micro-batch.

        Returns:
            Hooks, to be removed after its backward.
        """
        hooks: Hooks = []
        for name in residency.shared & residency.parameters.keys():
            parameter = residency.parameters[name]
            key = ("shared", name, number)
            if parameter.requires_grad and key in self._with(key):
                (carried,) = self._scratch.pop(key)
                assert carried is not None
                # In this order: autograd adds the gradient that comes later to the one that was there.
                placed = self._device.to_device(carried)
                hooks.append(parameter.register_hook(lambda gradient, placed=placed: placed + gradient))
        return hooks

    def put_shared(self, residency: Residency, number: int) -> None:
        """Keep, and drop from the parameters, the gradients of those that an earlier partition steps."""
        for name in residency.owned_elsewhere & residency.parameters.keys():
            parameter = residency.parameters[name]
            if parameter.grad is not None:
                self._put(("shared", name, number), [parameter.grad])
                parameter.grad = None

    def put_whole(self, name: str, gradient: Tensor) -> None:
        """Keep a parameter's gradient of the whole batch."""
        self._put(("whole", name, 0), [gradient])

    def pop_whole(self, name: str) -> Tensor:
        """That gradient, on the device, once; the caller may change it."""
        (gradient,) = self._with(("whole", name, 0)).pop(("whole", name, 0))
        assert gradient is not None
        return self._device.to_device(gradient)

    def clear(self) -> None:
        """The batch is done: nothing of it is needed."""
        self._behind = None
        self._scratch.clear()

    def close(self) -> None:
        """Give the memory and the file back."""
        self._behind = None
        self._scratch.close()

    def _put(self, key: Key, tensors: Sequence[Tensor | None]) -> None:
        """Keep tensors, which do not change any more; where copies go on beside the computing, those that were put before."""
        if self._device.shares_host:
            self._scratch.put(key, tensors)
            return
        self._catch_up()
        self._behind = key, [None if tensor is None else self._device.download(tensor) for tensor in tensors]

    def _with(self, key: Key) -> Scratch:
        """The store, a key that is on its way to it included."""
        if self._behind is not None and self._behind[0] == key:
            self._catch_up()
        return self._scratch

    def _catch_up(self) -> None:
        if self._behind is not None:
            (key, downloads), self._behind = self._behind, None
            # Page-locked memory is only lent: what is kept is a copy.
            self._scratch.put(key, [None if download is None else download.get().clone() for download in downloads])

    def _to_device_or_none(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self._device.to_device(tensor)
