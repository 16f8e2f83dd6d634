"""A residency: the time during which one partition's weights, and its optimizer state, are on the device."""

import math
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor
from typing import Protocol

import torch
from torch import Tensor, nn

from lowmem_pnn.device import Device, is_out_of_memory
from lowmem_pnn.device.transfers import overlapped_downloads
from lowmem_pnn.engine.prefetch import Prefetcher, Request
from lowmem_pnn.errors import BudgetError, CaptureError
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.stores.keys import state_key, weight_key
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.units import format_bytes


class WeightReader(Protocol):
    """Where weights come from: one partition's file, or anything that reads like it."""

    def read(self, name: str) -> Tensor:
        """A fresh host tensor."""
        ...


class Residency:
    """Puts layers' tensors on the device, and takes them off again.

    Off the device a layer's tensors are on torch's meta device: shapes without bytes.

    Args:
        chain: the model.
        start: the partition's first layer.
        stop: the layer after its last.
        device: where to put it.
        optimizer: its optimizer, resident with its state, or None where nothing is learnt or the state is elsewhere.
        frozen: its weights need no gradients.

    `groups` are the names of the parameters that it steps, those of a layer together, the first layer's first; `optimizers` has one
    for each group while it is loaded with state.
    """

    def __init__(
        self, chain: Chain, start: int, stop: int, device: Device, optimizer: OptimizerSpec | None, *, frozen: bool = False
    ) -> None:
        self.layers: tuple[Layer, ...] = chain.layers[start:stop]
        self._frozen = frozen
        self._device = device
        self._spec = optimizer
        # One tensor may have several names; the first is the one in the files.
        self._owner = {alias: group[0] for group in chain.ties for alias in group}
        # Auxiliary heads, which are not the model's, come after it.
        self._rank = {name: number for number, name in enumerate([*chain.persistent, *self.shapes()])}
        before, after = self._names(chain.layers[:start]), self._names(chain.layers[stop:])
        # What partitions before this one have too: the first of them keeps it and steps it.
        self.borrowed = {name for _, name, _ in self._tensors() if name in before}
        # What several partitions have: the gradient of a parameter is the sum of theirs.
        self.shared = {name for _, name, _ in self._tensors() if name in before or name in after}
        self._parameters: dict[str, nn.Parameter] = {}
        self._buffers: dict[str, Tensor] = {}
        # What the model says, whether or not the partition is frozen while it is here.
        self._requires_grad: dict[str, bool] = {}
        self._state: dict[str, dict[str, Tensor]] = {}
        self.groups = self._step_groups()
        self.optimizers: list[torch.optim.Optimizer] = []

    def load(self, reader: WeightReader, pool: Executor) -> None:
        """Bring everything onto the device; one tensor is read ahead of the one that is placed.

        Args:
            reader: of the partition's weight files.
            pool: a thread that reads.

        Raises:
            BudgetError: it does not fit; what was loaded by then is off the device again.
        """
        keys = self.keys()
        ahead = Prefetcher((Request(0, lambda key=key: reader.read(key)) for key in keys), pool, window_bytes=-1)  # type: ignore[misc]
        try:
            self.fill(ahead.take)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            full = True
        else:
            full = False
        finally:
            ahead.close()
        if full:  # not inside the handler: the exception holds tensors
            used = self._device.section_peak_bytes()
            self.unload()
            raise BudgetError(
                f"layers {self.layers[0].name!r} to {self.layers[-1].name!r} do not fit with their optimizer state: memory ran out at "
                f"{format_bytes(used)} of {format_bytes(self._device.budget_bytes)}; give a larger --max-gpu-mem, or more partitions"
            )

    def keys(self) -> list[str]:
        """The names, in weight files, of the tensors that `fill` takes, in its order."""
        wanted = list(self._tensors())
        keys = [weight_key(name) for _, name, _ in wanted]
        if self._spec is not None:
            trainable = {name: tensor for _, name, tensor in wanted if tensor.requires_grad}
            keys += [state_key(name, state) for name, tensor in trainable.items() for state in self._spec.layout(tensor)]
        return keys

    def fill(self, take: Callable[[], Tensor]) -> None:
        """Put tensors on the device.

        Args:
            take: gives the host tensors of `keys`, one after the other.
        """
        for kind, name, shape_of in list(self._tensors()):
            tensor = self._device.to_device(take())
            if kind == "parameter":
                self._requires_grad[name] = shape_of.requires_grad
                self._parameters[name] = nn.Parameter(tensor, requires_grad=shape_of.requires_grad and not self._frozen)
            else:
                self._buffers[name] = tensor
            del tensor
        if self._spec is not None:
            for name, parameter in self.trainable.items():
                self._state[name] = {state: self._device.to_device(take()) for state in self._spec.layout(parameter)}
        self._attach(self._parameters, self._buffers)
        if self._spec is not None:
            for names in self.groups:
                self.optimizers.append(self._spec.build({name: self._parameters[name] for name in names}, self._state))

    def _names(self, layers: tuple[Layer, ...]) -> set[str]:
        return {self.name_of(alias) for layer in layers for alias in (*layer.parameters(), *layer.buffers())}

    def _step_groups(self) -> list[tuple[str, ...]]:
        taken = set(self.borrowed)
        groups = []
        for layer in self.layers:
            names = (self.name_of(alias) for alias, tensor in layer.parameters().items() if tensor.requires_grad)
            if own := tuple(dict.fromkeys(name for name in names if name not in taken)):
                groups.append(own)
                taken.update(own)
        return groups

    def name_of(self, alias: str) -> str:
        """The name that a tensor is stored under, of the several that it may have."""
        return self._owner.get(alias, alias)

    def shapes(self) -> dict[str, Tensor]:
        """Parameters by the names that they are stored under, on the device or on torch's meta device."""
        return {self.name_of(alias): tensor for layer in self.layers for alias, tensor in layer.parameters().items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters, by name."""
        return self._parameters

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: parameter for name, parameter in self._parameters.items() if parameter.requires_grad}

    def in_model_order(self) -> list[nn.Parameter]:
        """The parameters that learn, as `model.parameters()` has them: norms are added up in that order."""
        return [parameter for _, parameter in sorted(self.trainable.items(), key=lambda item: self._rank[item[0]])]

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers, by name: what a rollback has to restore after a forward in train mode."""
        return self._buffers

    def settle_buffers(self) -> None:
        """Bring buffers that a forward replaced (`self.mean = ...`) back into the tensors that are saved and restored.

        Raises:
            CaptureError: it replaced one by a tensor of another shape or type.
        """
        for layer in self.layers:
            for alias, tensor in layer.buffers().items():
                name = self.name_of(alias)
                own = self._buffers[name]
                if tensor is own:
                    continue
                if (tensor.shape, tensor.dtype) != (own.shape, own.dtype):
                    raise CaptureError(
                        f"buffer {name!r} was {tuple(own.shape)} {own.dtype} and is {tuple(tensor.shape)} {tensor.dtype} after a "
                        "forward; keep its shape and type"
                    )
                own.copy_(tensor.detach())
                layer.set_tensor(alias, own)

    def check_shared_buffers(self, before: dict[str, Tensor]) -> None:
        """Refuse a forward that changes a buffer which other partitions have too: they would not see it.

        Args:
            before: buffers as they were before the forward, those of `shared` at least.

        Raises:
            CaptureError: it did.
        """
        for name in sorted(self.shared & before.keys()):
            if not torch.equal(before[name], self._buffers[name]):
                raise CaptureError(
                    f"buffer {name!r} is used on both sides of a cut, and a forward changes it; have all of its layers in one partition: "
                    "give other --cuts"
                )

    def check_gradients(self, title: str, stepped: Collection[str] = ()) -> None:
        """Refuse to go on where a parameter that learns here has no gradient after backward.

        Args:
            title: of the partition, for the message.
            stepped: names of parameters whose gradients are gone, since they stepped.

        Raises:
            CaptureError: one has none.
        """
        for name, parameter in self.trainable.items():
            if parameter.grad is None and name not in self.borrowed and name not in stepped:
                raise CaptureError(
                    f"parameter {name!r} got no gradient in {title}, and would never be trained; freeze it "
                    "(requires_grad_(False)), or have the model's forward use it for every batch"
                )

    def first_infinite(self) -> str | None:
        """The name of a trainable parameter that is no longer finite; None where all are."""
        return next((name for name, value in self.trainable.items() if not math.isfinite(float(value.detach().sum()))), None)

    def save(self, writer: TensorFile) -> None:
        """Write weights, buffers and optimizer state.

        Args:
            writer: a file with this partition's layout.
        """
        tensors = {weight_key(name): tensor for name, tensor in (*self._parameters.items(), *self._buffers.items())}
        tensors.update({state_key(name, key): tensor for name, state in self._state.items() for key, tensor in state.items()})
        for key, host in overlapped_downloads((key, self._device.download(tensor.detach())) for key, tensor in tensors.items()):
            writer.write_from(key, host)

    def unload(self) -> None:
        """Take everything off the device; what was not saved is lost."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            optimizer.state.clear()
            optimizer.param_groups.clear()
        self.optimizers.clear()
        parameters, buffers = {}, {}
        for kind, name, tensor in self._tensors():
            if kind == "parameter":
                requires_grad = self._requires_grad.get(name, tensor.requires_grad)
                parameters[name] = nn.Parameter(tensor.detach().to("meta"), requires_grad)
            else:
                buffers[name] = tensor.to("meta")
            del tensor
        self._attach(parameters, buffers)
        self._parameters, self._buffers, self._state = {}, {}, {}
        self._device.release()

    def _tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Kind, name in the files, and the (meta) tensor: each tensor once."""
        seen = set()
        for layer in self.layers:
            for kind, tensors in (("parameter", layer.parameters()), ("buffer", layer.buffers())):
                for alias, tensor in tensors.items():
                    name = self.name_of(alias)
                    if name not in seen:
                        seen.add(name)
                        yield kind, name, tensor

    def _attach(self, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor]) -> None:
        for layer in self.layers:
            for alias in layer.parameters():
                layer.set_tensor(alias, parameters[self.name_of(alias)])
            for alias in layer.buffers():
                layer.set_tensor(alias, buffers[self.name_of(alias)])
