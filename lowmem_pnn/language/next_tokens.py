"""Labels of tokens from Python: moved by one where a model of transformers expects them unmoved, refused where they are to be copied."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.sources.dataset import Dataset
from lowmem_pnn.sources.draws import DrawKey
from lowmem_pnn.sources.splits import Indices, SampleSplit, Split, read_samples
from lowmem_pnn.sources.subsets import WrappedSplit, labels_of
from lowmem_pnn.sources.targets import PYTORCH_IGNORED

# Samples that stand for all where labels are held against tokens.
_NUM_PROBES = 16
# Losses of transformers that compare the scores of a token with the label of the next one; None is its default.
_MOVING_LOSSES = (None, "ForCausalLM", "ForConditionalGeneration")
_WORDS = {"train": "training", "val": "validation", "test": "test"}


class MovedLabels(WrappedSplit):
    """Split whose tokens learn the label of the token after each, and the last one nothing.

    Args:
        base: Split with a label for each token, (B, T), of the token itself.
        ignored: Class number that is left out.
    """

    def __init__(self, base: Split, ignored: int) -> None:
        super().__init__(base)
        self._ignored = ignored

    def batch(self, indices: Indices, key: DrawKey | None = None) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
        """Return samples and moved labels, as `Split.batch` does."""
        samples, labels = read_samples(self.base, indices, key)
        return samples, self._moved(labels)

    def labels(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Return moved labels (B, T) alone, of samples by their numbers."""
        return self._moved(labels_of(self.base, numbers))

    def _moved(self, labels: Tensor) -> Tensor:
        return nn.functional.pad(labels[..., 1:], (0, 1), value=self._ignored)


def fit_labels(model: nn.Module, spec: str, dataset: Dataset, splits: Mapping[Any, Split]) -> tuple[Dataset, dict[Any, Split]]:
    """Return data in which each token has the token that comes next as its label, where the model's own loss would move labels so.

    Labels that are moved already stay as they are. Data that the package makes of text has its labels moved.

    Args:
        model: The model; only its class is looked at.
        spec: What the model is called in messages.
        dataset: Any data set; others than those with a label for each token come back as they are.
        splits: Its parts.

    Raises:
        ConfigError: Labels are what the model sees at the same place, and nobody says that they are of the next token.
    """
    if dataset.targets.kind != "tokens" or dataset.label_shape[-1] < 2:
        return dataset, dict(splits)
    ignored = PYTORCH_IGNORED if dataset.targets.ignored is None else dataset.targets.ignored
    moves, fitted, moved = moves_labels(model), dict(splits), []
    for name, split in splits.items():
        if not isinstance(source_of(split), SampleSplit):
            continue
        same, ahead, differ = _likeness(split, dataset, ignored)
        if moves and (ahead < 0.5 or ahead <= same):
            fitted[name] = MovedLabels(split, ignored)
            moved.append(name)
        elif not moves and differ and same == 1:
            raise ConfigError(
                f"data {dataset.name}: the label of each token is the token itself, which model {spec} sees, and would learn to copy; move "
                f"labels by one (that of a token is the next token, of the last one {ignored}), or mask in the inputs what is to be found"
            )
    if not moved:
        return dataset, fitted
    whose = "" if len(moved) == len(splits) else f" of the {' and '.join(_WORDS.get(name, name) for name in moved)} part"
    words = f"labels{whose} moved by one token, as the model's own loss moves them"
    return replace(dataset, preprocessing=f"{dataset.preprocessing}, {words}" if dataset.preprocessing else words), fitted


def moves_labels(model: nn.Module) -> bool:
    """Decide whether a model is one of transformers whose own loss compares the scores of a token with the label of the next one.

    Causal models do so, but for some that were made as decoders (BART's and its kin): their code tells.

    Args:
        model: Any model, also in an adapter's wrapper or a compiler's.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    own_loss = getattr(inner, "loss_type", None) in _MOVING_LOSSES and not hasattr(inner, "_loss_function")
    for kind in type(inner).__mro__:
        if not kind.__module__.startswith("transformers.") or "forward" not in vars(kind):
            continue
        code = getattr(inspect.unwrap(vars(kind)["forward"]), "__code__", None)
        if code is None:
            continue
        if (own_loss and "loss_function" in code.co_names) or any(name.startswith("shift") for name in code.co_varnames):
            return True
    return False


def source_of(split: Any) -> Any:
    """Return what gives the samples, without what chooses some of them, or some of their tensors."""
    while (base := getattr(split, "base", None)) is not None:
        split = base
    return split


def _likeness(split: Split, dataset: Dataset, ignored: int) -> tuple[float, float, bool]:
    """Hold labels against tokens, in a few samples.

    Returns:
        The share of labels that are the token of the same place, that of labels that are the next token, and whether labels differ.
    """
    samples, labels = split.batch(np.unique(np.linspace(0, len(split) - 1, _NUM_PROBES).astype(np.int64)))
    counted = labels != ignored
    same = ahead = 0.0
    for tokens in _tokens(samples, dataset):
        if tokens.dtype == torch.int64 and tokens.shape == labels.shape:
            same = max(same, _share(tokens == labels, counted))
            ahead = max(ahead, _share(tokens[..., 1:] == labels[..., :-1], counted[..., :-1]))
    return same, ahead, len(labels[counted].unique()) > 1


def _share(equal: Tensor, counted: Tensor) -> float:
    return float(equal[counted].double().mean()) if bool(counted.any()) else 0.0


def _tokens(samples: Tensor | tuple[Tensor, ...], dataset: Dataset) -> tuple[Tensor, ...]:
    """Return the tensors that labels may be of: what a decoder has written, the tokens by their usual name, or any."""
    if isinstance(samples, Tensor):
        return (samples,)
    named: Any = None if dataset.structure is None else dataset.structure.unflatten(samples)
    for name in ("decoder_input_ids", "input_ids") if isinstance(named, dict) else ():
        if name in named:
            return (named[name],)
    return samples
