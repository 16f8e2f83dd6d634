"""A compiled layer: the functions that the compiler made of a layer, in the place of its module's forward."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem_pnn.model.call_form import TensorSpec
from lowmem_pnn.model.layer import CompiledOutputs, Layer, is_of_head


@dataclass(frozen=True)
class CompileVariant:
    """A way to run a layer that is compiled by itself.

    Args:
        trains: whether the layer runs in train mode and with gradients; else in eval mode and without.
        learns_input: whether inputs have gradients too.
    """

    trains: bool
    learns_input: bool = False


@dataclass(frozen=True, eq=False)
class CompiledFunction:
    """A function that the compiler made of a traced layer.

    Args:
        call: function of a layer's tensors and its inputs; differentiable where it was compiled for training. Buffers change in place;
            those that a forward replaces (`self.mean = ...`) are returned after the outputs.
        replaced: numbers of these among the layer's tensors.
        sizes: numbers of samples that the function holds for.
        modules: global names of the generated modules, forward and backward.
    """

    call: Callable[..., Sequence[Tensor]]
    replaced: tuple[int, ...]
    sizes: frozenset[int]
    modules: tuple[dict[str, Any], ...]


class CompiledLayer:
    """A layer's compiled functions, in the place of its module's forward.

    Args:
        layer: layer whose tensors are the functions' arguments.
        before: boundary before the layer.
        functions: for each variant, the functions for ranges of numbers of samples.
    """

    def __init__(
        self, layer: Layer, before: Sequence[TensorSpec], functions: Mapping[CompileVariant, Sequence[CompiledFunction]]
    ) -> None:
        self._shapes = [spec.shape for spec in before]
        self._names = tuple(own_tensors(layer))
        self._channels_last = layer.precision.channels_last
        self._functions = dict(functions)

    def __call__(self, trains: bool, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> CompiledOutputs | None:
        """Run the function for these inputs.

        Args:
            trains: whether the layer is in train mode.
            tensors: parameters and buffers of the layer, by name.
            inputs: tensors of the boundary before the layer, each (B, ...).

        Returns:
            Tensors of the boundary after the layer, and buffers that the forward replaced; None where no function holds: another number of
            samples, or of axes; eval mode with gradients.
        """
        function = self._function_for(trains, inputs)
        if function is None:
            return None
        arguments = [
            *(tensors[name] for name in self._names),
            *(contiguous(tensor, self._channels_last) for tensor in inputs),
        ]
        if torch.is_grad_enabled() or not trains:
            made = tuple(function.call(*arguments))
        else:
            # The same function as with gradients, so that a recomputed forward gives the same bits.
            with torch.enable_grad():
                made = tuple(tensor.detach() for tensor in function.call(*arguments))
        count = len(made) - len(function.replaced)
        replaced = zip((self._names[number] for number in function.replaced), made[count:], strict=True)
        return made[:count], dict(replaced)

    def _function_for(self, trains: bool, inputs: tuple[Tensor, ...]) -> CompiledFunction | None:
        with_gradients = torch.is_grad_enabled()
        if not trains and with_gradients:
            return None
        if [tuple(tensor.shape[1:]) for tensor in inputs] != self._shapes:
            return None  # rows of a last layer in chunks
        learns_input = trains and (not with_gradients or any(tensor.requires_grad for tensor in inputs))
        functions = self._functions.get(CompileVariant(trains, learns_input))
        if functions is None and trains and (not with_gradients or not learns_input):
            # Gradients of inputs that nobody asks for are dropped; a forward without any needs none.
            functions = self._functions.get(CompileVariant(trains, not learns_input))
        size = len(inputs[0])
        return next((function for function in functions or () if size in function.sizes), None)

    @contextmanager
    def accepting_fake_tensors(self) -> Iterator[None]:
        """Have the generated modules allocate, and call PyTorch, but run none of their own kernels: so they accept fake tensors."""
        with ExitStack() as stack:
            for functions in self._functions.values():
                for function in functions:
                    for names in function.modules:
                        stack.enter_context(_without_kernels(names))
            yield


def own_tensors(layer: Layer) -> dict[str, Tensor]:
    """Return a layer's tensors, without its head's, each once, under its first name."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in {**layer.parameters(), **layer.buffers()}.items():
        if not is_of_head(name):
            tensors.setdefault(id(tensor), (name, tensor))
    return dict(tensors.values())


def contiguous(tensor: Tensor, channels_last: bool) -> Tensor:
    """Return a tensor as compiled functions take and return it: contiguous, maps in one of their two memory formats."""
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last and tensor.dim() == 4 else tensor.contiguous()


@contextmanager
def _without_kernels(names: dict[str, Any]) -> Iterator[None]:
    """Change a generated module so that its allocations go through PyTorch's dispatcher, and its kernels do nothing.

    Args:
        names: global names of the module.
    """

    def do_nothing(*_: object) -> None:
        """Replace a kernel, or a check of real tensors."""

    changed: dict[str, Any] = {name: do_nothing for name in names if name.startswith(("cpp_", "assert_"))}
    changed["empty_strided_cpu"] = lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype)
    changed["reinterpret_tensor"] = torch.as_strided
    before = {name: names[name] for name in changed}
    names.update(changed)
    try:
        yield
    finally:
        names.update(before)
