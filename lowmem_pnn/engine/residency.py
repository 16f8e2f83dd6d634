"""Residency: the time during which the weights of one partition, and their optimizer state, are on the device."""

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
    """Source of weights: a partition's file, or an object that reads like one."""

    def read(self, name: str) -> Tensor:
        """Read a tensor into fresh host memory."""
        ...


class Residency:
    """Loads the tensors of a partition's layers onto the device, and unloads them again.

    Off the device a layer's tensors are on torch's meta device: shapes without bytes.

    Args:
        chain: model as a chain of layers.
        start: number of the partition's first layer.
        stop: number of the layer after its last.
        device: device to load to.
        optimizer: optimizer whose state is resident too; None where the partition does not learn or its state stays elsewhere.
        frozen: whether the weights need no gradients.
    """

    groups: list[tuple[str, ...]]
    """Names of the parameters that the partition steps, by layer, the first layer's first."""

    optimizers: list[torch.optim.Optimizer]
    """The optimizers of the groups, while the partition is loaded with optimizer state."""

    owned_elsewhere: set[str]
    """Names of tied weights owned by an earlier partition: read here, stepped there."""

    shared: set[str]
    """Names of tensors that other partitions hold too: the gradient of such a parameter is the sum of theirs."""

    def __init__(
        self, chain: Chain, start: int, stop: int, device: Device, optimizer: OptimizerSpec | None, *, frozen: bool = False
    ) -> None:
        self.chain = chain
        self.layers: tuple[Layer, ...] = chain.layers[start:stop]
        self._frozen = frozen
        self._device = device
        self._spec = optimizer
        # Auxiliary heads, which are not the model's, come after the model's tensors.
        self._rank = {name: number for number, name in enumerate([*chain.persistent, *self.shapes()])}
        before, after = self._names(chain.layers[:start]), self._names(chain.layers[stop:])
        self.owned_elsewhere = {name for _, name, _ in self._tensors() if name in before}
        self.shared = {name for _, name, _ in self._tensors() if name in before or name in after}
        # By values of their samples forwards may go past these, which then take no step, as in plain PyTorch.
        self._may_lack_gradient = {chain.owner_of(name) for layer in self.layers for name in layer.may_lack_gradient}
        self._parameters: dict[str, nn.Parameter] = {}
        self._buffers: dict[str, Tensor] = {}
        # The model's own settings, whether or not the partition is frozen in this residency.
        self._requires_grad: dict[str, bool] = {}
        self._state: dict[str, dict[str, Tensor]] = {}
        self.groups = self._step_groups()
        self.optimizers = []

    def load(self, reader: WeightReader, pool: Executor) -> None:
        """Load everything onto the device; the next tensor is read while one is copied.

        Args:
            reader: source of the weights and the optimizer state.
            pool: pool of one thread, which reads.

        Raises:
            BudgetError: the partition does not fit; nothing of it is left on the device.
        """
        requests = (Request(0, lambda key=key: reader.read(key)) for key in self.keys())  # type: ignore[misc]
        prefetcher = Prefetcher(requests, pool, limit_bytes=-1)  # one tensor at a time, of any size
        try:
            self.fill(lambda: self._device.to_device(prefetcher.take()))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            full = True
        else:
            full = False
        finally:
            prefetcher.close()
        if full:  # not inside the handler: the exception holds tensors
            used = self._device.section_peak_bytes()
            self.unload()
            raise BudgetError(
                f"layers {self.layers[0].name!r} to {self.layers[-1].name!r} do not fit with their optimizer state: memory ran out at "
                f"{format_bytes(used)} of {format_bytes(self._device.budget_bytes)}; give a larger --max-gpu-mem, or more partitions"
            )

    def keys(self) -> list[str]:
        """Return the names, in weight files, of the tensors that `fill` takes, in its order."""
        wanted = list(self._tensors())
        keys = [weight_key(name) for _, name, _ in wanted]
        if self._spec is not None:
            trainable = {name: tensor for _, name, tensor in wanted if tensor.requires_grad}
            keys += [state_key(name, state) for name, tensor in trainable.items() for state in self._spec.layout(tensor)]
        return keys

    def layer_keys(self) -> list[list[str]]:
        """Return the names, in weight files, of the parameters and buffers that `fill` takes, in its order, by layer."""
        keys: list[list[str]] = []
        seen: set[str] = set()
        for layer in self.layers:
            names = dict.fromkeys(self.chain.owner_of(alias) for alias in (*layer.parameters(), *layer.buffers()))
            keys.append([weight_key(name) for name in names if name not in seen])
            seen.update(names)
        return keys

    def fill(self, take: Callable[[], Tensor]) -> None:
        """Load everything.

        Args:
            take: function that returns the tensors of `keys`, on the device, one after the other.
        """
        for kind, name, shape_of in list(self._tensors()):
            tensor = take()
            if kind == "parameter":
                self._requires_grad[name] = shape_of.requires_grad
                parameter = nn.Parameter(tensor, requires_grad=shape_of.requires_grad and not self._frozen)
                self.chain.hang_hooks(name, parameter)
                self._parameters[name] = parameter
                del parameter
            else:
                self._buffers[name] = nn.Parameter(tensor, False) if isinstance(shape_of, nn.Parameter) else tensor
            del tensor
        if self._spec is not None:
            for name, parameter in self.trainable.items():
                self._state[name] = {state: take() for state in self._spec.layout(parameter)}
        self._attach(self._parameters, self._buffers)
        if self._spec is not None:
            for names in self.groups:
                self.optimizers.append(self._spec.build({name: self._parameters[name] for name in names}, self._state))

    def shapes(self) -> dict[str, Tensor]:
        """Return the parameters by the names under which they are stored, on the device or on torch's meta device."""
        return {self.chain.owner_of(alias): tensor for layer in self.layers for alias, tensor in layer.parameters().items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All loaded parameters, by name."""
        return self._parameters

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The loaded parameters that learn, by name."""
        return {name: parameter for name, parameter in self._parameters.items() if parameter.requires_grad}

    def clip(self, max_norm: float, group: int | None = None) -> None:
        """Scale gradients down to a norm as `clip_grad_norm_` does; norms of those of weights that are rounded at random are in float32.

        Args:
            max_norm: most norm.
            group: number of the group of parameters that are scaled together; None for all that learn. Norms are added up in the order of
                `model.parameters()`, and of a group in its own.
        """
        assert self._spec is not None, "loaded with optimizer state"
        in_model_order = (name for name, _ in sorted(self.trainable.items(), key=lambda item: self._rank[item[0]]))
        parameters = [self.parameters[name] for name in (in_model_order if group is None else self.groups[group])]
        learning = [parameter for parameter in parameters if parameter.grad is not None]
        if not any(map(self._spec.rounds, learning)):
            nn.utils.clip_grad_norm_(learning, max_norm)
            return
        norms = [torch.linalg.vector_norm(parameter.grad, dtype=torch.float32) for parameter in learning]
        nn.utils.clip_grads_with_norm_(learning, max_norm, nn.utils.get_total_norm(norms))

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The loaded buffers, by name: a rollback has to restore them after a forward in train mode."""
        return self._buffers

    def copy_back_replaced_buffers(self) -> None:
        """Copy buffers that a forward replaced (`self.mean = ...`) into the loaded tensors, which are saved and restored.

        Raises:
            CaptureError: a buffer was replaced by a tensor of another shape or type.
        """
        for layer in self.layers:
            for alias, tensor in layer.buffers().items():
                name = self.chain.owner_of(alias)
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
        """Refuse a forward that changes a buffer which other partitions hold too: their copies would keep the old values.

        Args:
            before: values before the forward of the buffers in `shared`, and maybe of others.

        Raises:
            CaptureError: the forward changed a shared buffer.
        """
        for name in sorted(self.shared & before.keys()):
            if not torch.equal(before[name], self._buffers[name]):
                raise CaptureError(
                    f"buffer {name!r} is used on both sides of a cut, and a forward changes it; have all of its layers in one partition: "
                    "give other --cuts"
                )

    def check_gradients(self, title: str, stepped: Collection[str] = ()) -> None:
        """Refuse to go on where a parameter that learns here has no gradient after backward, but for those that a batch may go past.

        So it does where a forward has changed whether one learns: loaded again it would be as before.

        Args:
            title: the partition in words, for the message.
            stepped: names of parameters that have been stepped, so that their gradients are freed.

        Raises:
            CaptureError: a parameter has no gradient, or was frozen or unfrozen by a forward.
        """
        # Later partitions' gradients of a tied weight come to it as it steps.
        excused = {*self.shared, *stepped, *self._may_lack_gradient}
        for name, parameter in self._parameters.items():
            learns = self._requires_grad[name] and not self._frozen
            if parameter.requires_grad != learns:
                raise CaptureError(
                    f"a forward {'freezes' if learns else 'unfreezes'} parameter {name!r} in {title} (requires_grad), which is not kept with a "
                    "run; detach() what it gives, or give --freeze with --unfreeze-at"
                )
            if learns and parameter.grad is None and name not in excused:
                raise CaptureError(
                    f"parameter {name!r} got no gradient in {title}, and would never be trained; freeze it "
                    "(requires_grad_(False)), or have the model's forward use it for every batch"
                )

    def nonfinite_parameter(self) -> str | None:
        """Return the name of a trainable parameter with a value that is NaN or infinite; None where all are finite."""
        return next((name for name, value in self.trainable.items() if not math.isfinite(float(value.detach().sum()))), None)

    def save(self, writer: TensorFile) -> None:
        """Write weights, buffers and optimizer state, as far as they are the file's: frozen parameters lie in another one.

        Args:
            writer: file with this partition's layout.
        """
        # A buffer that an earlier partition holds too is at home there, and never changes.
        buffers = {name: buffer for name, buffer in self._buffers.items() if name not in self.owned_elsewhere}
        tensors = {weight_key(name): tensor for name, tensor in (*self._parameters.items(), *buffers.items())}
        tensors.update({state_key(name, key): tensor for name, state in self._state.items() for key, tensor in state.items()})
        own = ((key, tensor) for key, tensor in tensors.items() if key in writer.entries)
        for key, host in overlapped_downloads((key, self._device.download(tensor.detach())) for key, tensor in own):
            writer.write_from(key, host)

    def unload(self, *, release: bool = True) -> None:
        """Free the device memory of all tensors; values that were not saved are lost.

        Args:
            release: whether the memory is given back to the system at once. What comes next may use it all the same.
        """
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
        if release:
            self._device.release()

    def _names(self, layers: tuple[Layer, ...]) -> set[str]:
        """Return the names under which the tensors of layers are stored."""
        return {self.chain.owner_of(alias) for layer in layers for alias in (*layer.parameters(), *layer.buffers())}

    def _step_groups(self) -> list[tuple[str, ...]]:
        grouped = set(self.owned_elsewhere)
        groups = []
        for layer in self.layers:
            names = (self.chain.owner_of(alias) for alias, tensor in layer.parameters().items() if tensor.requires_grad)
            if group := tuple(dict.fromkeys(name for name in names if name not in grouped)):
                groups.append(group)
                grouped.update(group)
        return groups

    def _tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield kind, stored name and the (meta) tensor of each parameter and buffer, tied ones once."""
        seen = set()
        for layer in self.layers:
            for kind, tensors in (("parameter", layer.parameters()), ("buffer", layer.buffers())):
                for alias, tensor in tensors.items():
                    name = self.chain.owner_of(alias)
                    if name not in seen:
                        seen.add(name)
                        yield kind, name, tensor

    def _attach(self, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor]) -> None:
        """Set the tensors of all layers."""
        for layer in self.layers:
            for alias in layer.parameters():
                layer.set_tensor(alias, parameters[self.chain.owner_of(alias)])
            for alias in layer.buffers():
                layer.set_tensor(alias, buffers[self.chain.owner_of(alias)])
