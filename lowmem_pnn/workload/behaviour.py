"""Behaviour of a layer in train mode, found out on fake tensors: whether it changes buffers, draws at random, differs from eval mode."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem_pnn.dispatch_mode import DispatchMode
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.model.layer import Layer

_SAMPLES = 2


@dataclass(frozen=True)
class Behaviour:
    """What a forward of a layer does in train mode beside giving its outputs.

    Args:
        changes_buffers: whether it changes a buffer, or Python attributes that the next forward reads.
        is_fixed: whether its outputs are those of eval mode, sample by sample: it draws nothing at random, and changes no buffer.
    """

    changes_buffers: bool
    is_fixed: bool


def behaviour_of(layer: Layer, before: Sequence[TensorSpec]) -> Behaviour:
    """Find out what a forward of a layer does; where it does not run on fake tensors, the worst is said of it.

    Args:
        layer: the layer; its tensors are not used, and its mode is train mode afterwards.
        before: boundary before the layer.
    """
    if layer.kept or layer.left:
        return Behaviour(changes_buffers=True, is_fixed=False)
    buffers = layer.buffers()
    try:
        in_eval = _Operations.of(layer, before, training=False)
        in_train = _Operations.of(layer, before, training=True)
    except Exception:  # whatever a forward raises for tensors without values
        return Behaviour(changes_buffers=bool(buffers), is_fixed=False)
    finally:
        layer.train()
    changes = in_train.changes_buffers
    is_fixed = not changes and not in_train.draws and in_train.log == in_eval.log and not in_eval.changes_buffers
    return Behaviour(changes, is_fixed)


class _Operations(DispatchMode):
    """Records the operations of a forward, with their arguments but for the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = []
        self.draws = False
        self.changes_buffers = False

    @classmethod
    def of(cls, layer: Layer, before: Sequence[TensorSpec], *, training: bool) -> "_Operations":
        layer.train(training)
        recorded = cls()
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in layer.parameters().items()}
            buffers = {name: torch.empty_like(tensor, device="cpu") for name, tensor in layer.buffers().items()}
            inputs = [torch.empty((_SAMPLES, *spec.shape), dtype=spec.dtype) for spec in before]
            given = {**tensors, **buffers}
            versions = {name: tensor._version for name, tensor in buffers.items()}
            with recorded:
                layer.run_on(given, *inputs)
            recorded.changes_buffers = any(
                given[name] is not tensor or tensor._version != versions[name] for name, tensor in buffers.items()
            )
        return recorded

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.draws |= torch.Tag.nondeterministic_seeded in func.tags
        self.log.append((str(func), *(_described(value) for value in (*args, *kwargs.values()))))
        return func(*args, **kwargs)


def _described(value: Any) -> Any:
    """Return an argument in a form that can be compared: of a tensor its type and shape."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape)
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return repr(value)
