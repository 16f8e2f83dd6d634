"""Generation: what a language model says after some tokens, one token at a time, through its partitions, one resident at a time.

    every token:   rows (B, T) -> p0 -> p1 -> ... -> scores of the token after each row's last -> rows, one token longer

Nothing is kept of one token for the next (a chain of any layers has no cache of keys and values), so that every token is a forward over
the whole rows. But each reading of the weights serves all prompts at once, and a model of one partition is read once for all tokens.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.loaders import Batch
from lowmem_pnn.engine.stalls import StallKind
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.language.sampling import Sampling
from lowmem_pnn.language.token_rows import INPUT_NAMES
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.run.run import Run
from lowmem_pnn.samples.augment import AugmentationKey
from lowmem_pnn.seeds import seed_of
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.workload import Workload
from lowmem_pnn.workload.data_form import DataForm

# What stands in the labels where no scores are wanted.
_UNWANTED = -1


@dataclass(frozen=True)
class RowForm:
    """How rows of tokens are handed to a language model.

    Args:
        names: Names of the tensors of a row, in their order.
        context: Tokens of a row, T.
        vocabulary: Number of tokens that the model scores.
    """

    names: tuple[str, ...]
    context: int
    vocabulary: int

    @classmethod
    def of_workload(cls, workload: Workload) -> "RowForm | None":
        """Return how rows are handed to the model of a workload; None where it does not predict the tokens that come next.

        Args:
            workload: Model and data.
        """
        facts = workload.source.transformers
        if facts is not None and facts.task != "causal-lm":
            return None
        form = DataForm.of(workload.dataset)
        return cls.of(form.inputs, form.structure, form.targets, workload.chain.boundaries[-1][workload.task.output])

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
        if targets.kind != "tokens" or len(specs) != 1:
            return None
        [(shape, dtype)] = specs
        # Scores are often of more tokens than the data has: vocabularies are padded to a round number.
        if (
            len(shape) != 1
            or dtype != torch.int64
            or tuple(outputs.shape[:-1]) != shape
            or outputs.shape[-1] < targets.num_classes
        ):
            return None
        places = {"input_ids": 0} if structure is None else structure.unflatten(list(range(len(inputs))))
        known = {name for names in INPUT_NAMES.values() for name in names}
        if not isinstance(places, dict) or not {"input_ids"} <= set(places) <= known:
            return None
        return cls(tuple(sorted(places, key=places.__getitem__)), shape[0], outputs.shape[-1])

    def rows(self, tokens: Sequence[Sequence[int]]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return rows of the last tokens of each text, padded at their end, and where the token after each is scored.

        Args:
            tokens: Tokens of B texts, at least one each.

        Returns:
            Tensors (B, T) by `names`; and (B, T), the number of a text at its last token, elsewhere -1. All int64.
        """
        shape = (len(tokens), self.context)
        named = {name: torch.zeros(shape, dtype=torch.int64) for name in self.names}
        wanted = torch.full(shape, _UNWANTED, dtype=torch.int64)
        for row, text in enumerate(tokens):
            last = list(text)[-self.context :]
            named["input_ids"][row, : len(last)] = torch.tensor(last, dtype=torch.int64)
            if "attention_mask" in named:
                named["attention_mask"][row, : len(last)] = 1
            if "position_ids" in named:
                # Padding is a document of its own.
                rest = self.context - len(last)
                named["position_ids"][row] = torch.cat([torch.arange(len(last)), torch.arange(rest)])
            wanted[row, len(last) - 1] = row
        return tuple(named.values()), wanted


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


def generate_tokens(
    run: Run,
    form: RowForm,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    ends: Collection[int],
) -> list[Continuation]:
    """Have a model go on with some texts.

    Args:
        run: The run, with no partition resident.
        form: How rows are handed to its model.
        prompts: Tokens of the texts, at least one each. Of what is longer than a row the last tokens are seen.
        max_new_tokens: Tokens that are said of each text, at most.
        sampling: How a token is chosen. The choices of a text are functions of (seed, its number, the token's number) alone.
        seed: Seed of the choices.
        ends: Tokens after which a text is not gone on with.

    Raises:
        ConfigError: A prompt has no token, or one that the model does not know.
    """
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f"prompt {number + 1} has no token to go on from; give some text")
        if wrong := [token for token in prompt if not 0 <= token < form.vocabulary]:
            raise ConfigError(
                f"prompt {number + 1} has token {wrong[0]:,}, and the model knows {form.vocabulary:,} tokens, from 0; give the tokenizer that "
                "it was trained with"
            )
    texts = [Continuation([int(token) for token in prompt]) for prompt in prompts]
    scorer = _Scorer(run, form)
    with scorer.ready():
        for done in range(max_new_tokens):
            going = [number for number, text in enumerate(texts) if not text.is_ended]
            if not going:
                break
            for number, scores in scorer.scores({n: [*texts[n].prompt, *texts[n].tokens] for n in going}):
                token = sampling.next_token(scores, seed_of(seed, "generate", number, done))
                if token in ends:
                    texts[number].is_ended = True
                else:
                    texts[number].tokens.append(token)
    return texts


class _Scorer:
    """Scores the tokens that could come next, of several texts, through the partitions of a model.

    Args:
        run: The run.
        form: How rows are handed to its model.
    """

    def __init__(self, run: Run, form: RowForm) -> None:
        self._run, self._form = run, form
        self._only: ActivePartition | None = None
        # What is between two partitions is in memory: as many texts at a time as have room there.
        sizes = [sum(spec.sample_bytes for spec in specs) for specs in run.workload.chain.boundaries]
        cuts = [part.start for part in run.plan.partitions[1:]]
        largest = max((sizes[cut] for cut in cuts), default=0)
        room = run.session.device.buffer_sizes.boundary_bytes // 2
        self._most = max(1, room // largest) if largest else max(1, run.plan.partitions[0].batch)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Keep the only partition resident in the context, where there is but one."""
        partitions = self._run.partitions
        if partitions.last == 0:
            self._only = partitions.load(0, learns=False)
        try:
            yield
        finally:
            if self._only is not None:
                self._only.residency.unload()
                self._only = None

    def scores(self, texts: dict[int, list[int]]) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each text, and the scores (V,) of the token after it, on the host.

        Args:
            texts: Tokens of the texts by their numbers.
        """
        numbers = list(texts)
        for begin in range(0, len(numbers), self._most):
            chosen = numbers[begin : begin + self._most]
            found = self._scores_of([texts[number] for number in chosen])
            for place, number in enumerate(chosen):
                yield number, found[place]

    def _scores_of(self, texts: list[list[int]]) -> dict[int, Tensor]:
        partitions, output = self._run.partitions, self._run.workload.task.output
        tensors, wanted = self._form.rows(texts)
        found: dict[int, Tensor] = {}

        def pick(outputs: tuple[Tensor, ...], labels: Tensor) -> tuple[list[int], Tensor]:
            rows = labels.reshape(-1) != _UNWANTED
            chosen = outputs[output].reshape(len(rows), -1)[rows.nonzero()[:, 0].to(outputs[output].device)]
            return labels.reshape(-1)[rows].tolist(), chosen.float().cpu()

        def keep(picked: tuple[list[int], Tensor]) -> None:
            found.update(zip(picked[0], picked[1], strict=True))

        for number in range(partitions.last + 1):
            active = self._only or partitions.load(number, learns=False)
            try:
                loader = _Rows(tensors, wanted)
                if active.is_last:
                    partitions.executor.forward(active, loader, pick, keep)
                else:
                    kept: list[tuple[Tensor, ...]] = []
                    partitions.executor.forward(active, loader, _to_host, kept.append)
                    tensors = tuple(torch.cat(parts) for parts in zip(*kept, strict=True))
                    del kept
            finally:
                if self._only is None:
                    active.residency.unload()
        return found


def _to_host(outputs: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.cpu() for tensor in outputs)


class _Rows:
    """Loader of rows that are in memory.

    Args:
        tensors: Tensors (B, ...) of a boundary.
        labels: What goes with each row, (B, ...).
    """

    stall_kind: StallKind = "data"

    def __init__(self, tensors: tuple[Tensor, ...], labels: Tensor) -> None:
        self.num_samples = len(labels)
        self._tensors, self._labels = tensors, labels

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool,
        epoch: int = 0,
        start: int = 0,
        augmentation_key: AugmentationKey | None = None,
    ) -> Iterator[Batch]:
        """See `Loader.batches`; the order is always the same."""
        for begin in range(start * batch_size, self.num_samples, batch_size):
            part = slice(begin, begin + batch_size)
            yield tuple(tensor[part] for tensor in self._tensors), self._labels[part]

    def close(self) -> None:
        """See `Loader.close`; nothing is held."""
