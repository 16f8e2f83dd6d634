"""Matching of pretrained weights with a model: which tensor goes where, what is new, and what does not fit, all of it at once."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.pretrained.old_names import renamed
from lowmem_pnn.quantization.stored_weights import StoredPart, stored_parts
from lowmem_pnn.stores.header import TensorLayout, describe
from lowmem_pnn.zoo.library_models import PretrainedValues

# Values that are read at once, so that no tensor is whole in memory: 16 MB of float32.
_PIECE = 1 << 22
# What training wrappers put before the names of a model, and what a model is called in a larger one.
_PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "model.", "model._orig_mod.", "net.", "backbone.")
_MOST_NAMED = 4


@dataclass(frozen=True)
class PretrainedWeights:
    """Pretrained weights that fit a model.

    Args:
        values: where they are read from.
        names: name in the files of every tensor that is taken, by its name in the model's weight files.
        new: tensors of the head, with shape, that keep the constructor's values: the files have them for other classes, or not at all.
        left_out: names in the files that the model has no tensor for.
        prefix: prefix that the files' names have, and the model's do not.
        cast: number of tensors whose type in the files is another one than in the model.
        new_names: names of the tensors in `new`.
        stored: tensors of the model that a weight in the files is converted to, by name.
        also: further names in the files of a tied tensor, by the one under which it is taken; their values must be the same.
    """

    values: PretrainedValues
    names: Mapping[str, str]
    new: Sequence[str]
    left_out: Sequence[str]
    prefix: str
    cast: int
    new_names: Sequence[str] = ()
    stored: Mapping[str, StoredPart] = field(default_factory=dict)
    also: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @contextmanager
    def reading(self, folder: Path) -> Iterator[Callable[[str, TensorLayout], Iterator[tuple[int, Tensor]]]]:
        """Return a context with a function that reads a tensor of `names` by its name in the model and its layout, in the model's type.

        The function yields pieces of it: the number of the first element, and elements, flat.

        Args:
            folder: folder of files that are mapped meanwhile.

        Raises:
            ConfigError: a tensor that no layer holds has another shape, or one that the model ties has several values in the files.
        """
        layouts = self.values.layouts()
        with self.values.reading(folder) as read:

            def pieces(name: str, layout: TensorLayout) -> Iterator[tuple[int, Tensor]]:
                part, own = self.stored.get(name), self.names[name]
                dtype, shape = layout if part is None else (part.form.dtype, part.form.shape)
                if layouts[own][1] != shape:
                    raise ConfigError(
                        f"--weights {self.values.where}: {name} is {describe(dtype, shape)} in the model and {describe(*layouts[own])} in the "
                        "file"
                    )
                size = math.prod(shape)
                if part is None or not part.end:
                    for start in range(0, size, _PIECE) if own in self.also else ():
                        self._check_ties(own, read, slice(start, min(start + _PIECE, size)), dtype)
                if part is not None:
                    yield 0, part.form.encode(read(own))[part.end].contiguous().view(-1)
                    return
                for start in range(0, size, _PIECE):
                    yield start, read(own, elements=slice(start, min(start + _PIECE, size))).to(dtype)

            yield pieces

    def _check_ties(self, own: str, read: Callable[..., Tensor], elements: slice, dtype: torch.dtype) -> None:
        """Refuse a tied tensor whose names have several values in the files: only one of them would be trained from."""
        values = read(own, elements=elements).to(dtype)
        for other in self.also[own]:
            others = read(other, elements=elements).to(dtype)
            if not bool(((values == others) | (values.isnan() & others.isnan())).all()):
                raise ConfigError(
                    f"--weights {self.values.where}: {own!r} and {other!r} differ in the file, and are one tensor in the model; leave one out "
                    "of the file, or give a model that does not tie them (of transformers: tie_word_embeddings=False)"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return what `result.json` says of them, which a resume compares."""
        return {**self.summary(), "sha256": self.values.sha256()}

    def summary(self) -> dict[str, Any]:
        """Return the same without the hash, which reads all of them."""
        return {
            "source": self.values.where,
            "loaded": len(set(self.names.values())) if self.stored else len(self.names),
            "new": list(self.new),
            "left_out": list(self.left_out),
            "prefix": self.prefix,
            "cast": self.cast,
        }


def describe_weights(weights: Mapping[str, Any]) -> str:
    """Say in one line what of some pretrained weights a model has taken.

    Args:
        weights: what `PretrainedWeights.summary` returned.

    Example:
        >>> describe_weights({"source": "a.pt", "loaded": 2, "new": ["fc.bias (3,)"], "left_out": [], "prefix": "module.", "cast": 0})
        "pretrained: 2 tensors from a.pt; new, with random values: fc.bias (3,); prefix 'module.' left off"
    """
    text = f"pretrained: {weights['loaded']} tensors from {weights['source']}"
    if weights["new"]:
        text += f"; new, with random values: {shortened(weights['new'])}"
    if weights["left_out"]:
        text += f"; not in the model, left out: {shortened(weights['left_out'])}"
    if weights["prefix"]:
        text += f"; prefix {weights['prefix']!r} left off"
    if weights["cast"]:
        text += f"; {weights['cast']} cast to the model's types"
    return text


def match(
    values: PretrainedValues,
    chain: Chain,
    model: str,
    beside: Collection[str] = (),
    may_be_new: Callable[[str], bool] = lambda name: False,
    *,
    head_may_be_new: bool = True,
    loader: nn.Module | None = None,
) -> PretrainedWeights:
    """Match pretrained weights with a model.

    A head for another number of classes is new: tensors of the last layer whose first axis is the model's number of outputs, and which
    the files have with another first axis, or not at all.

    Args:
        values: the weights.
        chain: the model in layers.
        model: what the user calls it, for messages.
        beside: names of tensors that the files are not expected to have: those of adapters.
        may_be_new: whether a tensor of a name may be missing in the files, wherever it is.
        head_may_be_new: whether a head is new where the files have another.
        loader: the user's own model, asked where tensors are missing what it calls those that the files have; None where nobody is.

    Raises:
        ConfigError: tensors of the model are missing, or have another shape; or nothing matches. All faults are named, in one line.
        CheckpointError: a file is damaged.
    """
    found = values.layouts()
    persistent = set(chain.persistent)
    stored = stored_parts(chain.modules())
    wanted = {
        name: (stored[name].form.dtype, stored[name].form.shape) if name in stored else layout
        for name, layout in _layouts(chain).items()
        if name in persistent and name not in beside and not (name in stored and stored[name].end)
    }
    prefix = _prefix(found, wanted)
    # A name that is the model's with and without the prefix is the one with it.
    bare = {name.removeprefix(prefix): name for name in sorted(found, key=lambda name: name.startswith(prefix))}
    head, taken, faults, missing, used = _head(chain) if head_may_be_new else set(), {}, [], [], set()
    new: dict[str, str] = {}
    cast = 0
    also: dict[str, list[str]] = {}
    groups = {group[0]: group for group in chain.ties}
    # By the names under which tensors are stored: a tied one's may be of a module that no layer has.
    owned = {chain.owner_of(name): layout for name, layout in wanted.items()}
    if loader is not None and not all(any(alias in bare for alias in groups.get(name, (name,))) for name in owned):
        own_names = renamed(loader, {short: found[name] for short, name in bare.items()}, persistent)
        bare = {own_names.get(short, short): name for short, name in bare.items()}
    for name, (dtype, shape) in owned.items():
        aliases = [alias for alias in groups.get(name, (name,)) if alias in bare]
        used.update(aliases)
        if not aliases:
            if name in head or may_be_new(name):
                new[name] = f"{name} {shape}"
            elif not name.endswith("num_batches_tracked"):  # files of old have none
                missing.append(name)
            continue
        its_dtype, its_shape = found[bare[aliases[0]]]
        same_kind = its_dtype.is_floating_point == dtype.is_floating_point and its_dtype.is_complex == dtype.is_complex
        if its_shape == shape and same_kind:
            taken[name] = bare[aliases[0]]
            cast += its_dtype != dtype
            also |= {bare[aliases[0]]: [bare[one] for one in aliases[1:]]} if len(aliases) > 1 else {}
            faults += [
                f"{alias} is one tensor with {aliases[0]} in the model, and of shape {found[bare[alias]][1]}, not {shape}, in the file"
                for alias in aliases[1:]
                if found[bare[alias]][1] != shape
            ]
        elif name in head and its_shape[1:] == shape[1:] and len(its_shape) == len(shape) and same_kind:
            new[name] = f"{name} {shape}"
        else:
            faults.append(f"{name} is {describe(dtype, shape)} in the model and {describe(its_dtype, its_shape)} in the file")
    # What no layer holds is not looked at until it is read.
    for name in set(chain.unused) & bare.keys():
        taken[name] = bare[name]
        used.add(name)
    if not taken and not faults:
        few = ", ".join(map(repr, list(found)[:_MOST_NAMED])) or "nothing"
        few_wanted = ", ".join(map(repr, list(wanted)[:_MOST_NAMED]))
        raise ConfigError(
            f"--weights: nothing in {values.where} is of model {model}: it holds {few}, ..., and the model has {few_wanted}, ...; give "
            "weights of this model"
        )
    if missing:
        faults.append(f"missing in the file: {shortened(missing)}")
    if faults:
        raise ConfigError(
            f"--weights {values.where} does not fit model {model}: {shortened(faults)}; give weights of this model, or the --model-arg "
            "that they were made with"
        )
    left_out = [name for short, name in bare.items() if short not in used and not short.endswith("num_batches_tracked")]
    _check_scales(values.where, found, taken.values(), left_out)
    taken |= {name: taken[part.weight] for name, part in stored.items() if part.weight in taken and chain.owner_of(name) == name}
    return PretrainedWeights(values, taken, list(new.values()), left_out, prefix, cast, list(new), stored, also)


def _check_scales(where: str, found: Mapping[str, TensorLayout], taken: Collection[str], left_out: Collection[str]) -> None:
    """Refuse weights of 8 bits whose values are what they are with a scale alone, which the model has no tensor for."""
    for name in taken:
        if not (found[name][0].is_floating_point and found[name][0].itemsize == 1):
            continue
        if scale := next((one for one in left_out if one.startswith(f"{name}_scale")), None):
            raise ConfigError(
                f"--weights {where}: {name!r} is {str(found[name][0]).removeprefix('torch.')}, and its scale {scale!r} would be left out; "
                "multiply them, and give the weights in float32 or bfloat16"
            )


def _layouts(chain: Chain) -> dict[str, TensorLayout]:
    """Return type and shape of the model's tensors that are in layers, by every name; what no layer holds stays as it was made."""
    return {
        name: (tensor.dtype, tuple(tensor.shape))
        for layer in chain.layers
        for name, tensor in (*layer.parameters().items(), *layer.buffers().items())
    }


def _head(chain: Chain) -> set[str]:
    """Return the names of the parameters that make the model's outputs, one row of them for each output."""
    outputs = {size for spec in chain.boundaries[-1] for size in (*spec.shape[:1], *spec.shape[-1:])}
    return {
        name
        for name, parameter in chain.layers[-1].parameters().items()
        if parameter.dim() and parameter.shape[0] in outputs and chain.owner_of(name) == name
    }


def _prefix(found: Collection[str], wanted: Collection[str]) -> str:
    """Return the prefix that names in files have, if without it more of them are the model's; other names may be beside these."""

    def hits(prefix: str) -> int:
        return sum(1 for name in found if name.startswith(prefix) and name[len(prefix) :] in wanted)

    best = max(_PREFIXES, key=hits)
    return best if hits(best) > hits("") else ""


def shortened(texts: Sequence[str]) -> str:
    """Join texts with commas, the first few of them and how many more there are.

    Args:
        texts: the texts.
    """
    more = len(texts) - _MOST_NAMED
    return ", ".join(texts) if more <= 1 else f"{', '.join(texts[:_MOST_NAMED])} and {more} more"
