"""What is observed of a model on a few samples, to be compared without keeping its gradients; and a guard on its weights."""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_pnn.capture.dispatch_modes import storages_of, written_by
from lowmem_pnn.dispatch_mode import DispatchMode
from lowmem_pnn.errors import CaptureError
from lowmem_pnn.workload import Workload
from lowmem_pnn.zoo.deferred_init import FileBacked

# Sums that stand for a tensor.
_COLUMNS = 64
# Elements that are cast at a time.
_ELEMENTS = 1 << 18
# A gradient so much smaller than the largest is compared with this share of it.
_SMALL = 1e-2
# Tensors of so many bytes are not kept in memory for the backward.
_SPILLED_BYTES = 1 << 16


@dataclass(frozen=True)
class Gradient:
    """What stands for a gradient.

    Args:
        bits: sums of its bits: another gradient would have to be meant to have the same.
        sums: sums of its values, over every 64th element.
        norm: its norm.
    """

    bits: tuple[int, ...]
    sums: Tensor
    norm: float

    @classmethod
    def of(cls, tensor: Tensor) -> "Gradient":
        """Sum up a gradient.

        Args:
            tensor: the gradient.
        """
        values = tensor.detach().contiguous().flatten()
        columns = math.gcd(values.numel(), _COLUMNS)
        bits = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
        return cls(
            tuple(_sums(bits.view(-1, columns), torch.int64).tolist()),
            _sums(values.view(-1, columns), torch.float64),
            float(torch.linalg.vector_norm(values)),
        )

    def difference(self, other: "Gradient", least: float) -> float:
        """Return how much another gradient differs, relative to the larger one's norm; 0.0 where they are the same bits.

        Args:
            other: the other gradient.
            least: norm that a smaller one is taken for: the gradient of a bias before BatchNorm is nothing but rounding.
        """
        if self.bits == other.bits:
            return 0.0
        size = float((self.sums - other.sums).norm()) / max(self.norm, other.norm, least, 1e-300)
        # NaN, for one, has no size.
        return max(size, 1e-16) if math.isfinite(size) else math.inf


def _sums(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums of columns in a wider type, some rows at a time: PyTorch casts all that it is given."""
    total = torch.zeros(rows.shape[1], dtype=dtype)
    for part in rows.split(max(1, _ELEMENTS // rows.shape[1])):
        total += part.sum(0, dtype=dtype)
    return total


@dataclass
class Observed:
    """What one side of a comparison gave.

    Args:
        values: small results by what they are: outputs, loss, buffers, Python state.
        gradients: what stands for each parameter's gradient, by the name that the parameter is stored under.
    """

    values: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, Gradient] = field(default_factory=dict)

    def take_gradient(self, name: str, parameter: Tensor) -> None:
        """Note a complete gradient, and free it.

        Args:
            name: name that the parameter is stored under.
            parameter: the parameter.
        """
        assert parameter.grad is not None
        self.gradients[name] = Gradient.of(parameter.grad)
        parameter.grad = None


class Unwritten(DispatchMode):
    """Refuses operations that write into parameters of the user's own model, before they do, but for those that it is known to write into.

    Args:
        workload: model in layers, and data.
        parameters: the model's parameters, by name.
    """

    def __init__(self, workload: Workload, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._title = f"model {workload.source.spec}"
        self._names = {
            parameter.untyped_storage()._cdata: name
            for name, parameter in parameters.items()
            if name not in workload.bare.written
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in storages_of(written_by(func, args, kwargs)):
            if storage in self._names:
                raise CaptureError(
                    f"a forward of {self._title} writes into its parameter {self._names[storage]!r} by values of its samples, which nobody "
                    "could foresee, and which would be lost; keep such values in a buffer"
                )
        return func(*args, **kwargs)


def differences(one: Observed, other: Observed) -> dict[str, float]:
    """Return what differs between two sides, in words, with the size of the difference.

    Args:
        one: what one side gave.
        other: what the other gave.

    Returns:
        Sizes relative to the values; infinite where there is something on one side alone, or what is no number.
    """
    found = {what: difference(one.values.get(what), other.values.get(what)) for what in one.values.keys() | other.values.keys()}
    least = _SMALL * max((gradient.norm for gradient in one.gradients.values()), default=0.0)
    for name in one.gradients.keys() | other.gradients.keys():
        mine, theirs = one.gradients.get(name), other.gradients.get(name)
        found[f"the gradient of {name!r}"] = math.inf if mine is None or theirs is None else mine.difference(theirs, least)
    return {what: size for what, size in found.items() if size > 0}


def difference(one: Any, other: Any) -> float:
    """Return how much two values differ, relative to the first; 0.0 where they are the same, infinite where they cannot be compared.

    Args:
        one: a tensor, a number, or any other value.
        other: what it is compared with; NaN is the same as NaN.
    """
    if isinstance(one, float) and isinstance(other, float):
        one, other = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return 0.0 if type(one) is type(other) and one == other else math.inf
    if one.shape != other.shape or one.dtype != other.dtype:
        return math.inf
    if not bool(((one != other) & ~(one.isnan() & other.isnan())).any()):
        return 0.0
    one, other = one.double(), other.double()
    size = float((one - other).abs().max() / max(float(one.abs().max()), 1e-300))
    return size if math.isfinite(size) else math.inf


class Spilled:
    """Keeps the tensors that a forward saves for its backward in a file, where they are large and not there anyway.

    Args:
        folder: folder of the file.
        held: tensors that are there anyway.
    """

    def __init__(self, folder: Path, held: Iterable[Tensor]) -> None:
        self._files = FileBacked(folder, _SPILLED_BYTES)
        self._held = {tensor.untyped_storage().data_ptr() for tensor in held}

    def keeping(self) -> AbstractContextManager[Any]:
        """Return the context of the forward, in which no transform of `torch.func` takes gradients."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int]:
        if tensor.nbytes < _SPILLED_BYTES or tensor.layout != torch.strided or tensor.untyped_storage().data_ptr() in self._held:
            return tensor, tensor._version
        mapped = self._files.map_like(tensor)
        # Where an axis is expanded all its elements are one.
        once = tuple(slice(None if stride else 1) for stride in tensor.stride())
        mapped[once].copy_(tensor.detach()[once])
        return mapped, mapped._version

    def _unpack(self, packed: tuple[Tensor, int]) -> Tensor:
        tensor, version = packed
        # What autograd looks for itself where there are no hooks.
        if tensor._version != version:
            raise RuntimeError("one of the variables needed for gradient computation has been modified by an inplace operation")
        return tensor


def refuses_hooks(error: Exception) -> bool:
    """Decide whether a forward did not run in `Spilled.keeping`, as `torch.func.grad` and its like do not.

    Args:
        error: what it raised.
    """
    return isinstance(error, RuntimeError) and "saved tensor hooks" in str(error)
