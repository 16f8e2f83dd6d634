"""Weights of transformers' models by the names that the model has now: what its own loader renames, merges and splits, a tensor at a time."""

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_pnn.config.transformers_place import has_weights, place_of
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.pretrained.matching import shortened
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.stores.header import TensorLayout
from lowmem_pnn.zoo.library_models import PretrainedValues
from lowmem_pnn.zoo.model_source import ModelSource


@dataclass
class _Group:
    """Tensors of the files that become one tensor of the model, or several.

    Args:
        converter: What makes them, of transformers.
        target: Name of the first one in the model.
        parts: Names in the files, each with the pattern that it matched.
    """

    converter: Any
    target: str
    parts: list[tuple[str, str]] = field(default_factory=list)


class TransformersWeights:
    """Weights of a model of transformers, by the names that its `state_dict` has.

    Files may be older than the library, of the model without a head, or of one with another head.

    Args:
        values: The weights, by the names in their files.
        source: The model.
    """

    def __init__(self, values: PretrainedValues, source: ModelSource) -> None:
        self._values, self._source = values, source

    @property
    def where(self) -> str:
        """Where they are, in words."""
        return self._values.where

    def are_there(self) -> bool:
        """Decide whether they can be read without fetching anything."""
        own = self._source.spec
        return self._values.are_there() or (place_of(own) is not None and has_weights(own))

    def sha256(self) -> str:
        """Return a hash of the files."""
        return self._values.sha256()

    def may_be_new(self, name: str) -> bool:
        """Decide whether a tensor may be missing in the files, and have the constructor's values.

        Of a head for another task all may, and of any model what its class says; of a language model nothing else.

        Args:
            name: Name of the tensor in the model.
        """
        facts, model = self._source.transformers, self._model
        assert facts is not None
        if any(re.search(pattern, name) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()):
            return True
        base = str(getattr(model, "base_model_prefix", ""))
        return facts.has_new_head and (not name.startswith(f"{base}.") or "pooler" in name)

    def check(self) -> None:
        """Refuse files that lack tensors of the model, before anything else is opened.

        Raises:
            ConfigError: They do; all of these are named.
            CheckpointError: A file is missing or damaged.
        """
        found, groups = self.layouts(), dict[int, list[str]]()
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            groups.setdefault(id(tensor), []).append(name)
        missing = [
            names[0]
            for names in groups.values()
            if not any(name in found for name in names) and not self.may_be_new(names[0]) and not self._is_of_new_head(names[0])
        ]
        if missing:
            raise ConfigError(
                f"--weights {self.where} does not fit model {self._source.spec}: missing in the file: {shortened(missing)}; give weights "
                "of this model"
            )

    def _is_of_new_head(self, name: str) -> bool:
        """Decide whether a tensor may be one of a head with as many outputs as the data has classes."""
        return self.head_may_be_new and not name.startswith(f"{getattr(self._model, 'base_model_prefix', '')}.")

    @property
    def head_may_be_new(self) -> bool:
        """Whether a head for another number of classes has the constructor's values: not where it is one for tokens."""
        assert self._source.transformers is not None
        return self._source.transformers.task not in ("causal-lm", "masked-lm", "seq2seq")

    def layouts(self) -> Mapping[str, TensorLayout]:
        """Return element type and shape of every tensor by name; what the model has not keeps the files' names."""
        layouts = {target: self._found[own] for target, own in self._renamed.items()}
        for group in self._groups:
            made = self._convert(group, self._empty)
            layouts |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()}
        return layouts

    @contextmanager
    def reading(self, folder: Path) -> Iterator[Callable[..., Tensor]]:
        """Return a context with a function that reads one tensor, or some of its elements; see `SafetensorsFiles.reading`."""
        homes = {name: group for group in self._groups for name in self._made(group)}
        with self._values.reading(folder) as read_own:
            last: dict[str, Tensor] = {}

            def read(name: str, elements: slice | None = None) -> Tensor:
                if name in self._renamed:
                    return read_own(self._renamed[name], elements)
                if name not in last:
                    last.clear()
                    last.update(self._convert(homes[name], read_own))
                tensor = last[name]
                return tensor.contiguous() if elements is None else tensor.contiguous().view(-1)[elements]

            yield read

    @cached_property
    def _model(self) -> nn.Module:
        with torch.device("meta"):
            return self._source.build()

    @cached_property
    def _found(self) -> Mapping[str, TensorLayout]:
        """Element type and shape by the files' names."""
        return self._values.layouts()

    @cached_property
    def _groups(self) -> list[_Group]:
        return self._matched[1]

    @cached_property
    def _renamed(self) -> dict[str, str]:
        return self._matched[0]

    @cached_property
    def _matched(self) -> tuple[dict[str, str], list[_Group]]:
        """Return the files' names by the model's, and what is made of several."""
        loading = importlib.import_module("transformers.core_model_loading")
        mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(self._model)
        renamings = [one for one in mapping if isinstance(one, loading.WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, loading.WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        wanted = dict(self._model.state_dict())
        prefix = getattr(self._model, "base_model_prefix", "")
        renamed: dict[str, str] = {}
        groups: dict[str, _Group] = {}
        for name in sorted(self._found, key=loading.dot_natural_key):
            target, pattern = loading.rename_source_key(name, renamings, converters, prefix, wanted)
            if target not in wanted and name in wanted:
                target, pattern = name, None
            if target in wanted and pattern is not None:
                group = groups.setdefault(target, _Group(deepcopy(by_pattern[pattern]), target))
                group.parts.append((name, pattern))
            else:
                renamed[target if target in wanted else name] = name
        return renamed, list(groups.values())

    def _made(self, group: _Group) -> list[str]:
        return list(self._convert(group, self._empty))

    def _empty(self, name: str) -> Tensor:
        dtype, shape = self._found[name]
        return torch.empty(shape, dtype=dtype, device="meta")

    def _convert(self, group: _Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        converter = deepcopy(group.converter)
        try:
            for name, pattern in group.parts:
                converter.add_tensor(group.target, name, pattern, read(name))
            made = converter.convert(group.target, model=self._model, config=self._model.config)
        except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"--weights {self.where}: {group.parts[0][0]!r} and {len(group.parts) - 1} others cannot be made {group.target!r} of: "
                f"{one_line(error)[:200]}; give weights of this model"
            ) from error
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}
