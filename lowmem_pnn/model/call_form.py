"""Call forms: the tensors of a batch as a model takes them, by position, by name or in a dict, and as it returns them."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_pnn.errors import CaptureError, ConfigError


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of one tensor of a boundary."""

    shape: tuple[int, ...]
    """Shape of one sample: without the batch axis, which is always axis 0."""

    dtype: torch.dtype
    """Type that the layers return and take."""

    learns: bool = field(default=True, compare=False)
    """Whether it depends on weights that learn, and so may have a gradient: not where it is made of the inputs alone, as a mask is."""
    features: int | None = field(default=None, compare=False)
    """Axis of a sample that its features, or channels, lie on: 0 or -1; None where nothing is known of it."""

    @property
    def takes_gradient(self) -> bool:
        """Whether a gradient comes to it in training."""
        return self.learns and self.dtype.is_floating_point

    @property
    def map_shape(self) -> tuple[int, ...] | None:
        """Shape of a sample with channels first, where it is a map of them over positions; None for a vector, and for tokens (T, D).

        Where nothing is known of its features, two axes are tokens, and more are a map with channels first.

        Example:
            >>> TensorSpec((8, 8, 3), torch.float32, features=-1).map_shape, TensorSpec((9, 30), torch.float32).map_shape
            ((3, 8, 8), None)
        """
        if len(self.shape) < 2 or (len(self.shape) == 2 and self.features != 0):
            return None
        return (self.shape[-1], *self.shape[:-1]) if self.features == -1 else self.shape

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample.

        Example:
            >>> TensorSpec((3, 32, 32), torch.float32).sample_bytes
            12288
        """
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


def ask_for_gradients(tensors: Iterable[Tensor], specs: Sequence[TensorSpec], learns: bool = True) -> tuple[Tensor, ...]:
    """Have those tensors of a boundary ask for gradients that have some in the whole model, and return all of them.

    A tensor that asks for a gradient has kernels chosen by it: attention on the CPU takes another one for such a mask, which rounds
    otherwise and keeps all scores.

    Args:
        tensors: leaves, which are changed.
        specs: the boundary.
        learns: whether anything before the boundary learns.

    Example:
        >>> specs = TensorSpec((2,), torch.float32), TensorSpec((3,), torch.float32, learns=False)
        >>> [tensor.requires_grad for tensor in ask_for_gradients([torch.ones(1, 2), torch.ones(1, 3)], specs)]
        [True, False]
    """
    return tuple(tensor.requires_grad_(learns and spec.takes_gradient) for tensor, spec in zip(tensors, specs, strict=True))


@dataclass(frozen=True)
class _Place:
    """The place of a tensor in the arguments, or in what is returned."""

    number: int


@dataclass(frozen=True)
class CallForm:
    """How a flat tuple of tensors is handed to a model: `form.call(model, tensors)`.

    Args:
        args: positional arguments, with places for the tensors.
        kwargs: arguments by name, with places for the tensors.
        names: what each tensor is called, for messages.
    """

    args: tuple[Any, ...] = (_Place(0),)
    kwargs: Mapping[str, Any] | None = None
    names: tuple[str, ...] = ("x",)

    @classmethod
    def of(cls, sample: Any, model: nn.Module) -> "CallForm":
        """Find the form in which a model takes samples.

        A tuple goes to the model's arguments where it takes so many, else as one tuple; a dict by the names of its arguments where it has
        them all, else as one dict.

        Args:
            sample: an example: a tensor, or a tuple, list or dict of tensors, which may hold more of these.
            model: the model, for its forward's arguments.

        Raises:
            ConfigError: the sample holds something else.

        Example:
            >>> class Both(nn.Module):
            ...     def forward(self, a, b): return a + b
            >>> CallForm.of({"b": torch.ones(1), "a": torch.zeros(1)}, Both()).names
            ('b', 'a')
        """
        names: list[str] = []

        def place(value: Any, name: str) -> Any:
            if isinstance(value, Tensor):
                names.append(name)
                return _Place(len(names) - 1)
            if isinstance(value, Mapping):
                return {key: place(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()}
            if isinstance(value, Sequence) and not isinstance(value, str | bytes):
                items = [place(item, f"{name}.{number}" if name else str(number)) for number, item in enumerate(value)]
                return items if type(value) is list else tuple(items)
            raise ConfigError(
                f"a sample holds a {type(value).__name__}{name and f' ({name!r})'}; give tensors, or tuples and dicts of tensors"
            )

        places = place(sample, "")
        if isinstance(places, _Place):
            return cls()
        parameters = inspect.signature(model.forward).parameters.values()
        kinds = [parameter.kind for parameter in parameters]
        if isinstance(places, dict):
            known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            if all(isinstance(key, str) for key in places) and (known >= places.keys() or _is_in(kinds, "VAR_KEYWORD")):
                return cls((), places, tuple(names))
            return cls((places,), None, tuple(names))
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(positional) >= len(places) > 1 or _is_in(kinds, "VAR_POSITIONAL"):
            return cls(tuple(places), None, tuple(names))
        return cls((places,), None, tuple(names))

    @classmethod
    def positional(cls, count: int) -> "CallForm":
        """Return the form of so many tensors, each an argument of its own.

        Args:
            count: number of tensors.
        """
        return cls(tuple(map(_Place, range(count))), None, tuple(map(str, range(count))) if count > 1 else ("x",))

    def flatten(self, sample: Any) -> tuple[Tensor, ...]:
        """Return the tensors of a sample, or of a batch of them, in the order of their places.

        Args:
            sample: a tensor, tuple or dict as the example was.

        Example:
            >>> form = CallForm.of((torch.zeros(1), {"b": torch.ones(1)}), nn.Identity())
            >>> form.flatten((torch.zeros(2), {"b": torch.ones(3)}))
            (tensor([0., 0.]), tensor([1., 1., 1.]))
        """
        if isinstance(sample, Tensor):
            return (sample,)
        items = sample.values() if isinstance(sample, Mapping) else sample
        return tuple(tensor for item in items for tensor in self.flatten(item))

    def call(self, model: Any, tensors: Sequence[Any]) -> Any:
        """Call a model.

        Args:
            model: the model, or a copy of it.
            tensors: tensors of a batch in the order of their places, or what stands for them.
        """

        def fill(value: Any) -> Any:
            if isinstance(value, _Place):
                return tensors[value.number]
            if isinstance(value, dict):
                return {key: fill(item) for key, item in value.items()}
            return [fill(item) for item in value] if isinstance(value, list) else tuple(map(fill, value))

        return model(*map(fill, self.args), **{key: fill(item) for key, item in (self.kwargs or {}).items()})


ONE_TENSOR = CallForm()
"""The form of a model that takes one tensor."""


def _is_in(kinds: Sequence[Any], name: str) -> bool:
    return any(kind.name == name for kind in kinds)


@dataclass(frozen=True)
class _Container:
    """A tuple, list, dict or dataclass: its class, and its items by key."""

    kind: type
    keys: tuple[Any, ...]
    items: tuple[Any, ...]


@dataclass(frozen=True)
class OutputForm:
    """What a model returns, with places for its tensors.

    Args:
        form: the places, and all that is no tensor.
        names: what each tensor is called, for messages: `logits`, `0`, `masks.1`.
    """

    form: Any
    names: tuple[str, ...]

    @classmethod
    def of(cls, value: Any, expand: Callable[[Any], Any] | None = None) -> "tuple[OutputForm, tuple[Any, ...]]":
        """Take apart what a model returned.

        Args:
            value: a tensor, or any nesting of tuples, lists, dicts and dataclasses with tensors and other values.
            expand: is given what is none of these, and returns what it stands for.

        Returns:
            The form, and the tensors in their order.

        Raises:
            CaptureError: it holds an object that nobody can tell from another one.
        """
        tensors: list[Any] = []
        names: list[str] = []

        def take(value: Any, name: str) -> Any:
            value = value if expand is None else expand(value)
            if _stands_for_tensor(value):
                tensors.append(value)
                names.append(name)
                return _Place(len(tensors) - 1)
            if not _is_container(value):
                if not _is_value(value):
                    raise CaptureError(
                        f"the model returns a {type(value).__name__}{name and f', {name!r}'}; have it return tensors, or tuples and dicts of "
                        "tensors: what makes something else of them belongs into the loss"
                    )
                return value
            pairs = [(key, take(item, f"{name}.{key}" if name else str(key))) for key, item in _items(value)]
            return _Container(type(value), tuple(key for key, _ in pairs), tuple(item for _, item in pairs))

        return cls(take(value, ""), tuple(names)), tuple(tensors)

    @property
    def is_tensor(self) -> bool:
        """Whether it is one tensor, in nothing."""
        return isinstance(self.form, _Place)

    def __str__(self) -> str:
        if not isinstance(self.form, _Container):
            return "tensor" if self.is_tensor else type(self.form).__name__
        return f"{self.form.kind.__name__} of {len(self.form.items)}"

    def build(self, tensors: Sequence[Tensor]) -> Any:
        """Return what the model would return with these tensors.

        Args:
            tensors: tensors in the order of their places.

        Example:
            >>> form, _ = OutputForm.of({"scores": torch.zeros(1), "scale": 2})
            >>> form.build([torch.ones(1)])
            {'scores': tensor([1.]), 'scale': 2}
        """

        def make(form: Any) -> Any:
            if isinstance(form, _Place):
                return tensors[form.number]
            return _make(form.kind, form.keys, [make(item) for item in form.items]) if isinstance(form, _Container) else form

        return make(self.form)


NOTHING = OutputForm(None, ())
"""The form of what holds no tensors: None."""


def like(example: Any, stand_in: Any) -> Any:
    """Return a container as the example is, whose items are those of something that stands for it.

    Args:
        example: a tuple, list, dict or dataclass; anything else is returned as it is.
        stand_in: is asked for items, or attributes, as the example would be.
    """
    if not _is_container(example):
        return example
    keys = [key for key, _ in _items(example)]
    if isinstance(example, tuple | list):
        items = [stand_in[number] for number in range(len(keys))]
    else:
        items = [stand_in[key] if isinstance(example, Mapping) else getattr(stand_in, str(key)) for key in keys]
    return _make(type(example), keys, items)


def _stands_for_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(type(value), "__torch_function__")


# Values of which there is one each, compared by identity.
_SINGLE = type, FunctionType, NoneType, Enum, torch.dtype, torch.layout, torch.memory_format


def _is_value(value: Any) -> bool:
    """Decide whether a value equals others of its kind by what it is, as numbers and text do, and an array or a distribution does not."""
    is_array = hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0
    return isinstance(value, _SINGLE) or (any("__eq__" in vars(cls) for cls in type(value).__mro__[:-1]) and not is_array)


def _is_container(value: Any) -> bool:
    if isinstance(value, str | bytes | type):
        return False
    return isinstance(value, tuple | list | Mapping) or dataclasses.is_dataclass(value)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return iter(value.items())
    if isinstance(value, tuple | list):
        return zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    return ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))


def _make(kind: type[Any], keys: Sequence[Any], items: Sequence[Any]) -> Any:
    """Make a container of its class, as its own constructor might refuse to."""
    if issubclass(kind, tuple | list):
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    pairs = dict(zip(keys, items, strict=True))
    if issubclass(kind, dict):
        # A dict that is a dataclass too, as the outputs of transformers are, takes its keys by name.
        by_name = dataclasses.is_dataclass(kind)
        return kind(**pairs) if by_name else kind(pairs)
    made = object.__new__(kind)
    for key, item in pairs.items():
        object.__setattr__(made, key, item)
    return made
