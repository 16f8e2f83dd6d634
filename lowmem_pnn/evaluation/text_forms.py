"""Text forms: how a language model is shown a text that it goes on with, or a source that it writes a target for.

RowForm    prompt and what was said, in one row of tokens                      gpt, Llama, ...
PairForm   the prompt in one row, a start token and what was said in another   T5, BART, ...
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.language.sequence_rows import PAIR_NAMES
from lowmem_pnn.language.token_rows import INPUT_NAMES
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.workload import Workload
from lowmem_pnn.workload.data_form import DataForm
from lowmem_pnn.zoo.deferred_init import skeleton

# What stands in the labels where no scores are wanted.
UNWANTED = -1

Rows = tuple[tuple[Tensor, ...], Tensor]
"""Tensors (B, ...) that a model takes, and (B, T) with the number of a text where the token after it is scored, elsewhere -1. All int64."""


@dataclass
class Continuation:
    """A text, and what a model says after it.

    Args:
        prompt: Its tokens.
        tokens: What was said so far.
        is_ended: Whether that ends in an end token, which is not among `tokens`.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    is_ended: bool = False


@dataclass(frozen=True)
class RowForm:
    """How rows of tokens are handed to a language model that goes on with them.

    Args:
        names: Names of the tensors of a row, in their order.
        context: Tokens of a row, T.
        vocabulary: Number of tokens that the model scores.
    """

    names: tuple[str, ...]
    context: int
    vocabulary: int

    @property
    def source_context(self) -> int | None:
        """Most tokens of a source: there is none, for the prompt lies in the row."""
        return None

    @property
    def most_tokens(self) -> int | None:
        """Tokens that can be said at most: any number, of which the last are seen."""
        return None

    @classmethod
    def of(
        cls, inputs: Sequence[TensorSpec], structure: pytree.TreeSpec | None, targets: Targets, outputs: TensorSpec
    ) -> "RowForm | None":
        """Return how rows are handed to a model; None where it does not predict the tokens that come next.

        Args:
            inputs: Tensors of one sample.
            structure: Their structure, where they are several or have names; None where a sample is one tensor.
            targets: Form of the targets.
            outputs: Scores that the model gives.
        """
        specs = {(tuple(spec.shape), spec.dtype) for spec in inputs}
        if len(specs) != 1 or not _are_scores_of_tokens(outputs, targets):
            return None
        [(shape, dtype)] = specs
        if dtype != torch.int64 or tuple(outputs.shape[:-1]) != shape:
            return None
        names = _names_in_order(inputs, structure)
        known = {name for names in INPUT_NAMES.values() for name in names}
        if names is None or not {"input_ids"} <= set(names) <= known:
            return None
        return cls(names, shape[0], outputs.shape[-1])

    def sequences(self, text: Continuation) -> tuple[list[int] | None, list[int]]:
        """Return the source, of which there is none, and the tokens after which the next one is scored: the last that a row holds."""
        return None, [*text.prompt, *text.tokens][-self.context :]

    def rows(self, texts: Sequence[Continuation]) -> Rows:
        """Return rows of the last tokens of B texts, padded at their end.

        Args:
            texts: The texts, of at least one token each.
        """
        shape = (len(texts), self.context)
        named = {name: torch.zeros(shape, dtype=torch.int64) for name in self.names}
        wanted = torch.full(shape, UNWANTED, dtype=torch.int64)
        for row, text in enumerate(texts):
            _, last = self.sequences(text)
            named["input_ids"][row, : len(last)] = torch.tensor(last, dtype=torch.int64)
            if "attention_mask" in named:
                named["attention_mask"][row, : len(last)] = 1
            if "position_ids" in named:
                # Padding is a document of its own.
                rest = self.context - len(last)
                named["position_ids"][row] = torch.cat([torch.arange(len(last)), torch.arange(rest)])
            wanted[row, len(last) - 1] = row
        return tuple(named.values()), wanted


@dataclass(frozen=True)
class PairForm:
    """How sources are handed to a language model, and what it has written of their targets.

    Args:
        names: Names of the tensors of a sample, in their order.
        context: Tokens of a source, S.
        target_context: Tokens of a target, T.
        vocabulary: Number of tokens that the model scores.
        start: Token that a target begins with, before the first that is written.
        padding: Token that rows are filled up with.
    """

    names: tuple[str, ...]
    context: int
    target_context: int
    vocabulary: int
    start: int
    padding: int

    @property
    def source_context(self) -> int | None:
        """Most tokens of a source, which is the prompt."""
        return self.context

    @property
    def most_tokens(self) -> int | None:
        """Tokens that can be said at most."""
        return self.target_context

    @classmethod
    def of(
        cls,
        inputs: Sequence[TensorSpec],
        structure: pytree.TreeSpec | None,
        targets: Targets,
        outputs: TensorSpec,
        start: int | None,
        padding: int | None,
    ) -> "PairForm | None":
        """Return how sources are handed to a model; None where it does not write targets.

        Args:
            inputs: Tensors of one sample.
            structure: Their structure; None where a sample is one tensor.
            targets: Form of the targets.
            outputs: Scores that the model gives.
            start: Token that its decoder begins with; None where nobody says, which is that of padding.
            padding: Its token for padding; None where it has none.
        """
        names = _names_in_order(inputs, structure)
        if names is None or not {"input_ids", "decoder_input_ids"} <= set(names) <= set(PAIR_NAMES):
            return None
        shapes = {name: tuple(spec.shape) for name, spec in zip(names, inputs, strict=True)}
        source, target = shapes["input_ids"], shapes["decoder_input_ids"]
        start = padding if start is None else start
        fits = (
            all(spec.dtype == torch.int64 for spec in inputs)
            and len(source) == len(target) == 1
            and shapes.get("attention_mask", source) == source
            and tuple(outputs.shape[:-1]) == target
            and _are_scores_of_tokens(outputs, targets)
        )
        if not fits or start is None:
            return None
        return cls(names, source[0], target[0], outputs.shape[-1], start, 0 if padding is None else padding)

    def sequences(self, text: Continuation) -> tuple[list[int] | None, list[int]]:
        """Return the source, as much as a row holds, and the tokens of the target so far, after which the next one is scored."""
        return text.prompt[: self.context], [self.start, *text.tokens]

    def rows(self, texts: Sequence[Continuation]) -> Rows:
        """Return rows of B sources and of what was written for each, padded at their end.

        Args:
            texts: The texts, of fewer tokens said than a target has.
        """
        shapes = {"decoder_input_ids": (len(texts), self.target_context)}
        named = {
            name: torch.full(
                shapes.get(name, (len(texts), self.context)), 0 if name == "attention_mask" else self.padding, dtype=torch.int64
            )
            for name in self.names
        }
        wanted = torch.full(shapes["decoder_input_ids"], UNWANTED, dtype=torch.int64)
        for row, text in enumerate(texts):
            source, written = self.sequences(text)
            assert source is not None
            named["input_ids"][row, : len(source)] = torch.tensor(source, dtype=torch.int64)
            if "attention_mask" in named:
                named["attention_mask"][row, : len(source)] = 1
            named["decoder_input_ids"][row, : len(written)] = torch.tensor(written, dtype=torch.int64)
            wanted[row, len(written) - 1] = row
        return tuple(named.values()), wanted


TextForm = RowForm | PairForm


def text_form(workload: Workload) -> TextForm | None:
    """Return how texts are handed to the model of a workload; None where it neither goes on with texts nor writes them.

    Args:
        workload: Model and data.
    """
    facts = workload.source.transformers
    if facts is not None and facts.task not in ("causal-lm", "seq2seq"):
        return None
    form, outputs = DataForm.of(workload.dataset), workload.chain.boundaries[-1][workload.task.output]
    if (rows := RowForm.of(form.inputs, form.structure, form.targets, outputs)) is not None:
        return rows
    if source_context_of(form) is None:
        return None
    config: Any = facts.config if facts is not None else getattr(skeleton(workload.source.build), "config", None)
    start, padding = (_number(getattr(config, name, None)) for name in ("decoder_start_token_id", "pad_token_id"))
    return PairForm.of(form.inputs, form.structure, form.targets, outputs, start, padding)


def source_context_of(form: DataForm) -> int | None:
    """Return the most tokens of a source, where a run's samples are sources with targets; None where they are anything else.

    Args:
        form: Form of the samples.
    """
    names = _names_in_order(form.inputs, form.structure) or ()
    if not {"input_ids", "decoder_input_ids"} <= set(names):
        return None
    return form.inputs[names.index("input_ids")].shape[0]


def check_prompt(form: TextForm, prompt: Sequence[int], number: int) -> None:
    """Refuse a prompt that a model cannot go on with.

    Args:
        form: How texts are handed to the model.
        prompt: Its tokens.
        number: Its number, from 1.

    Raises:
        ConfigError: It has no token, or one that the model does not know.
    """
    if not len(prompt):
        raise ConfigError(f"prompt {number} has no token to go on from; give some text")
    if wrong := [token for token in prompt if not 0 <= token < form.vocabulary]:
        raise ConfigError(
            f"prompt {number} has token {wrong[0]:,}, and the model knows {form.vocabulary:,} tokens, from 0; give the tokenizer that "
            "it was trained with"
        )


def _are_scores_of_tokens(outputs: TensorSpec, targets: Targets) -> bool:
    # Scores are often of more tokens than the data has: vocabularies are padded to a round number.
    return targets.kind == "tokens" and len(outputs.shape) == 2 and outputs.shape[-1] >= targets.num_classes


def _names_in_order(inputs: Sequence[TensorSpec], structure: pytree.TreeSpec | None) -> tuple[str, ...] | None:
    """Return the names of a sample's tensors, in their order; None where they have none. A tensor alone is the tokens."""
    places = {"input_ids": 0} if structure is None else structure.unflatten(list(range(len(inputs))))
    if not isinstance(places, dict) or not all(isinstance(place, int) for place in places.values()):
        return None  # tensors without names, or several under one
    return tuple(sorted(places, key=places.__getitem__))


def _number(token: Any) -> int | None:
    return token if type(token) is int else None
