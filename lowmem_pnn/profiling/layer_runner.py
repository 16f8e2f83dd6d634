"""A runner that times one layer, forward and backward, on tensors of its own."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowmem_pnn.device import Device
from lowmem_pnn.model.call_form import TensorSpec, ask_for_gradients
from lowmem_pnn.model.layer import Layer

_MOST_RANDOM = 1 << 22


class LayerRunner:
    """Runs of one layer on random tensors on the device.

    Args:
        layer: The layer; its own tensors are neither read nor changed.
        before: Boundary before the layer.
        device: Device, open.
        learns_input: Whether the backward computes the gradient of the inputs.
        per_layer_loss: Whether the backward begins at the class scores of the layer's head.
    """

    def __init__(
        self, layer: Layer, before: Sequence[TensorSpec], device: Device, *, learns_input: bool, per_layer_loss: bool
    ) -> None:
        self._layer, self._before, self._device, self._per_layer_loss = layer, before, device, per_layer_loss
        self.learns_input = learns_input
        self._random = torch.Generator(device.torch_device).manual_seed(0)
        copies: dict[int, Tensor] = {}
        for tensor in [*layer.parameters().values(), *layer.buffers().values()]:
            if id(tensor) not in copies:
                copies[id(tensor)] = self._like(tensor)
        self._tensors = {name: copies[id(tensor)] for name, tensor in {**layer.parameters(), **layer.buffers()}.items()}

    def best(self, samples: int, times: int) -> tuple[float, float]:
        """Return the seconds of forward and backward, the least of several runs after one that warms up."""
        self.run(samples, learns_input=self.learns_input)
        runs = [self.run(samples, learns_input=self.learns_input) for _ in range(times)]
        return min(forward for forward, _ in runs), min(backward for _, backward in runs)

    def run(self, samples: int, *, learns_input: bool) -> tuple[float, float]:
        """Return the seconds of one forward and of one backward in train mode."""
        self._layer.train()
        inputs = ask_for_gradients(self._inputs(samples), self._before, learns_input)
        if self._device.shares_host:
            # Activations of a whole partition take fresh pages, which the system has to zero; a layer alone would use its own again.
            self._device.release()
        with torch.enable_grad():
            outputs: tuple[Tensor, ...] = ()

            def forward() -> None:
                nonlocal outputs
                outputs = self._layer.run_on(dict(self._tensors), *inputs, scores=self._per_layer_loss)

            forward_seconds = timed(self._device, forward)
            learnt = [tensor for tensor in outputs if tensor.requires_grad]
            gradients = [torch.full_like(tensor, 1e-3) for tensor in learnt]
            backward_seconds = timed(self._device, lambda: torch.autograd.backward(learnt, gradients)) if learnt else 0.0
        for tensor in self._tensors.values():
            tensor.grad = None
        return forward_seconds, backward_seconds

    def emit(self, samples: int, times: int = 2) -> float:
        """Return the seconds of a forward in eval mode, the least of several; the first one warms up."""
        self._layer.eval()
        inputs = self._inputs(samples)
        with torch.no_grad():
            return min(timed(self._device, lambda: self._layer.run_on(dict(self._tensors), *inputs)) for _ in range(times))

    def _inputs(self, samples: int) -> list[Tensor]:
        return [self._filled(self._device.empty((samples, *spec.shape), spec.dtype)) for spec in self._before]

    def _like(self, tensor: Tensor) -> Tensor:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device.torch_device)
        return self._filled(made).requires_grad_(tensor.requires_grad)

    def _filled(self, tensor: Tensor) -> Tensor:
        """Fill a tensor with small positive values, valid for a variance too; integers with 0, which is a valid token."""
        if not tensor.is_floating_point():
            return tensor.zero_()
        # Random values of a vocabulary's matrix would take longer than its products.
        return tensor.uniform_(0.01, 0.1, generator=self._random) if tensor.numel() <= _MOST_RANDOM else tensor.fill_(0.05)


def clock_of(device: Device) -> Callable[[], float]:
    """Return the clock of a device, in seconds.

    Where this thread computes alone the clock counts the thread's own time, so that others on a busy machine do not count; else wall
    time.
    """
    return time.thread_time if device.shares_host and torch.get_num_threads() == 1 else time.perf_counter


def timed(device: Device, work: Callable[[], object]) -> float:
    """Return the seconds of some work on a device, by the device's clock."""
    clock = clock_of(device)
    device.synchronize()
    began = clock()
    work()
    device.synchronize()
    return clock() - began
