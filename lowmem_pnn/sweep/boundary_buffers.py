"""Boundary buffers of a sweep: activations, gradients and random states of one batch, kept on the host or on disk.

forward     boundary activations, and random states where a partition draws from a generator
backward    gradients of boundaries, and of tied weights that an earlier partition owns
for steps   gradients of the whole batch, where a step has to wait for all of them, and weights that a forward has written into
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lowmem_pnn.device import Device, Download
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.seeds import seed_generators, seed_of
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.scratch import Scratch
from lowmem_pnn.sweep.stored_gradients import StoredGradients

Key = tuple[str, int | str, int]


class SharedGradient:
    """The gradient of a tied weight that later partitions have kept: added to the weight's own one, as soon as that is there.

    Args:
        parameter: the weight, where it is about to get its own gradient of a micro-batch.
        pop: returns the kept gradient, and forgets it.
    """

    def __init__(self, parameter: nn.Parameter, pop: Callable[[], Tensor]) -> None:
        self._parameter, self._pop = parameter, pop
        self._is_added = False
        self._hook = parameter.register_hook(self._add)

    def _add(self, gradient: Tensor) -> Tensor:
        """Return the sum of a gradient and the kept one, in the memory of the kept one."""
        self._is_added = True
        # In this order: autograd adds the gradient that comes later to the one that was there.
        return self._pop().add_(gradient)

    def finish(self) -> None:
        """End the micro-batch's backward: where it went past the weight here, the kept gradient is all of it."""
        self._hook.remove()
        if not self._is_added:
            torch.autograd.backward([self._parameter], [self._pop()])


class BoundaryBuffers:
    """Keeps the tensors of a batch that one visit leaves for a later one; boundary k is the one before partition k.

    Args:
        device: training device, open.
        folder: folder in which the scratch store may make its file.
        memory_bytes: most bytes of tensors that are kept in memory.
        counter: counter of the bytes written to disk and read.
        seed: seed of the run.
        phase: word that seeds all random choices.
    """

    stored: StoredGradients
    """Gradients of the batch that are made in pieces; where host and device are one."""

    def __init__(self, device: Device, folder: Path, memory_bytes: int, counter: IoCounter, seed: int, phase: str) -> None:
        self._device = device
        self._scratch = Scratch(folder, memory_bytes, counter)
        self.stored = StoredGradients(self._scratch)
        self._seed = seed
        self._phase = phase
        # The tensors of the last `put`, still being downloaded from a device that copies beside its computing.
        self._downloading: tuple[Key, list[Download | None]] | None = None

    def put_activations(self, boundary: int, number: int, tensors: Sequence[Tensor]) -> None:
        """Keep the activations of a micro-batch at a boundary.

        Args:
            boundary: number of the partition after the boundary.
            number: number of the micro-batch.
            tensors: boundary tensors, each (M, ...), on the device.
        """
        self._put(("activations", boundary, number), [tensor.detach() for tensor in tensors])

    def activations(self, boundary: int, number: int) -> tuple[Tensor, ...]:
        """Return the activations of a micro-batch at a boundary, on the host: leaves of a new graph."""
        key = ("activations", boundary, number)
        # Detached once more: a tensor may be kept for two boundaries, and needs a gradient for one of them at a time.
        return tuple(tensor.detach() for tensor in self._scratch_with(key).get(key) if tensor is not None)

    def drop_activations(self, boundary: int, number: int) -> None:
        """Forget the activations of a micro-batch at a boundary."""
        key = ("activations", boundary, number)
        self._scratch_with(key).drop(key)

    def put_gradients(self, boundary: int, number: int, gradients: Sequence[Tensor | None]) -> None:
        """Keep the gradients of the boundary tensors of a micro-batch.

        Args:
            boundary: number of the partition after the boundary.
            number: number of the micro-batch.
            gradients: gradients, each (M, ...), on the device; None where a tensor has none.
        """
        self._put(("gradient", boundary, number), gradients)

    def pop_gradients(self, boundary: int, number: int) -> tuple[Tensor | None, ...]:
        """Return the gradients of the boundary tensors of a micro-batch, on the device, and forget them."""
        key = ("gradient", boundary, number)
        return tuple(None if tensor is None else self._device.to_device(tensor) for tensor in self._scratch_with(key).pop(key))

    def restore_random_state(self, partition: int, number: int, step: int) -> tuple[Tensor, ...]:
        """Bring the random generators into the state in which a micro-batch first came to a partition, and return the state.

        Args:
            partition: number of the partition that is about to run.
            number: number of the micro-batch.
            step: number of optimizer steps before the batch.
        """
        for before in range(partition, 0, -1):
            if ("random", before, number) in self._scratch:
                state = tuple(tensor for tensor in self._scratch.get(("random", before, number)) if tensor is not None)
                self._device.set_random_state(state)
                return state
        seed_generators(seed_of(self._seed, self._phase, 0, step, number))
        return self._device.random_state()

    def put_random_state(self, partition: int, number: int, state_before: tuple[Tensor, ...]) -> None:
        """Keep the state of the random generators after a partition's forward, if it drew from them.

        Args:
            partition: number of the partition that ran.
            number: number of the micro-batch.
            state_before: state that `restore_random_state` returned before the forward.
        """
        state = self._device.random_state()
        if any(not torch.equal(one, other) for one, other in zip(state_before, state, strict=True)):
            self._scratch.put(("random", partition + 1, number), state)

    def add_shared_gradients(self, residency: Residency, number: int, *, alone: bool) -> list[SharedGradient]:
        """Have later partitions' gradients of tied weights added, as autograd does in the whole model.

        Args:
            residency: partition that is about to run a micro-batch.
            number: number of the micro-batch.
            alone: whether it is the whole batch: the gradients of weights that step here are then left for `add_in_step`.

        Returns:
            The gradients, to be finished after the micro-batch's backward.
        """
        gradients: list[SharedGradient] = []
        for name in residency.shared & residency.parameters.keys():
            parameter = residency.parameters[name]
            key = ("shared", name, number)
            if alone and self._is_added_in_step(residency, name):
                continue
            if parameter.requires_grad and key in self._scratch_with(key):
                # On the host it is read when the own gradient is there: it waits in the scratch store until then.
                pop = partial(self._pop_one, key)
                if not self._device.shares_host:
                    pop = partial(_itself, self._device.to_device(pop()))
                gradients.append(SharedGradient(parameter, pop))
        return gradients

    def add_in_step(self, residency: Residency, names: Iterable[str]) -> None:
        """Add later partitions' gradients of tied weights to those of the whole batch, slice by slice.

        Args:
            residency: partition whose parameters have gradients.
            names: names of parameters that are about to be stepped.
        """
        size = self._device.buffer_sizes.slice_elements
        for name in residency.shared.intersection(names):
            key = ("shared", name, 0)
            if not self._is_added_in_step(residency, name) or key not in self._scratch_with(key):
                continue
            parameter = residency.parameters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # its own layers went past it
            flat = parameter.grad.view(-1)
            for begin in range(0, len(flat), size):
                elements = slice(begin, min(begin + size, len(flat)))
                flat[elements] += self._device.to_device(self._scratch.elements(key, elements))
            self._scratch.drop(key)

    @staticmethod
    def _is_added_in_step(residency: Residency, name: str) -> bool:
        # What hangs on a parameter is to see all of its gradient.
        return name not in residency.owned_elsewhere and not residency.chain.has_hooks(name)

    def _pop_one(self, key: Key) -> Tensor:
        (kept,) = self._scratch.pop(key)
        assert kept is not None, "a gradient was put"
        return kept

    def put_shared_gradients(self, residency: Residency, number: int) -> None:
        """Keep the gradients of tied weights that an earlier partition owns, and take them from the parameters.

        Args:
            residency: partition that has run a micro-batch forward and backward.
            number: number of the micro-batch.
        """
        for name in residency.owned_elsewhere & residency.parameters.keys():
            parameter = residency.parameters[name]
            if parameter.grad is not None:
                self._put(("shared", name, number), [parameter.grad])
                parameter.grad = None

    def put_parameter_gradient(self, name: str, gradient: Tensor) -> None:
        """Keep the gradient of a parameter over the whole batch."""
        self._put(("whole", name, 0), [gradient])

    def pop_parameter_gradient(self, name: str, elements: slice | None = None) -> Tensor:
        """Return the gradient of a parameter over the whole batch, on the device, once; the caller may change it.

        Args:
            name: name of the parameter.
            elements: elements to return, flat, in the order of the parameter's memory; None for all, in its shape. What is returned in
                such slices is forgotten with the batch.
        """
        if name in self.stored.names:
            return self.stored.elements(name, elements)
        return self._pop_elements(("whole", name, 0), elements)

    def put_written(self, name: str, parameter: Tensor) -> None:
        """Keep the values of a parameter that a forward has written into, from its backward to its step."""
        self._put(("written", name, 0), [parameter.detach()])

    def pop_written(self, name: str, elements: slice | None = None) -> Tensor:
        """Return these values, on the device, once; the caller may change them.

        Args:
            name: name of the parameter.
            elements: elements to return, as in `pop_parameter_gradient`.
        """
        return self._pop_elements(("written", name, 0), elements)

    def _pop_elements(self, key: Key, elements: slice | None) -> Tensor:
        scratch = self._scratch_with(key)
        tensor = scratch.pop(key)[0] if elements is None else scratch.elements(key, elements)
        assert tensor is not None
        return self._device.to_device(tensor)

    def clear(self) -> None:
        """Forget everything, at the end of a batch; the scratch store's file stays for the next one."""
        self._downloading = None
        self.stored.clear()
        self._scratch.clear()

    def close(self) -> None:
        """Forget everything, and free the memory and the file."""
        self._downloading = None
        self.stored.clear()
        self._scratch.close()

    def _put(self, key: Key, tensors: Sequence[Tensor | None]) -> None:
        """Keep device tensors, which must not change any more; they reach the scratch store with the next call, where copies overlap."""
        if self._device.shares_host:
            self._scratch.put(key, tensors)
            return
        self._finish_download()
        self._downloading = key, [None if tensor is None else self._device.download(tensor) for tensor in tensors]

    def _scratch_with(self, key: Key) -> Scratch:
        """Return the scratch store, with the tensors of the key in it if they were still being downloaded."""
        if self._downloading is not None and self._downloading[0] == key:
            self._finish_download()
        return self._scratch

    def _finish_download(self) -> None:
        if self._downloading is not None:
            (key, downloads), self._downloading = self._downloading, None
            # Page-locked memory is only lent: the scratch store keeps a copy.
            self._scratch.put(key, [None if download is None else download.get().clone() for download in downloads])


def _itself(tensor: Tensor) -> Tensor:
    return tensor
