"""Generation: what a language model says after some tokens, one token at a time, and its scores through partitions, one resident at a time.

    every token:   rows (B, T) -> p0 -> p1 -> ... -> scores of the token after each row's last -> rows, one token longer

Here nothing is kept of one token for the next (a chain of any layers has no cache of keys and values), so that every token is a forward
over the whole rows. But each reading of the weights serves all prompts at once, and a model of one partition is read once for all tokens.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.engine.stalls import StallKind
from lowmem_pnn.evaluation.text_forms import UNWANTED, Continuation, TextForm, check_prompt
from lowmem_pnn.language.sampling import Sampling
from lowmem_pnn.run.run import Run
from lowmem_pnn.samples.augment import AugmentationKey
from lowmem_pnn.seeds import seed_of
from lowmem_pnn.stores.activations import Batch


class Scorer(Protocol):
    """Scores the tokens that could come next."""

    form: TextForm
    """How texts are handed to the model."""

    at_once: int | None
    """Texts that are gone on with side by side; None for all."""

    def ready(self) -> AbstractContextManager[None]:
        """Return the context in which it scores."""
        ...

    def scores(self, texts: dict[int, Continuation]) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each text, and the scores (V,) of the token after it, on the host.

        Args:
            texts: The texts by their numbers.
        """
        ...


def generate_tokens(
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    ends: Collection[int],
) -> list[Continuation]:
    """Have a model go on with some texts, or write one for each.

    Args:
        scorer: The model.
        prompts: Tokens of the texts, at least one each. Of what is longer than a row the last tokens are seen; of a source the first.
        max_new_tokens: Tokens that are said of each text, at most.
        sampling: How a token is chosen. The choices of a text are functions of (seed, its number, the token's number) alone.
        seed: Seed of the choices.
        ends: Tokens after which a text is not gone on with.

    Raises:
        ConfigError: A prompt has no token, or one that the model does not know.
    """
    for number, prompt in enumerate(prompts, start=1):
        check_prompt(scorer.form, prompt, number)
    texts = [Continuation([int(token) for token in prompt]) for prompt in prompts]
    most = max_new_tokens if scorer.form.most_tokens is None else min(max_new_tokens, scorer.form.most_tokens)
    at_once = scorer.at_once or len(texts)
    with scorer.ready():
        for begin in range(0, len(texts), at_once):
            group = range(begin, min(begin + at_once, len(texts)))
            for done in range(most):
                going = {number: texts[number] for number in group if not texts[number].is_ended}
                if not going:
                    break
                for number, scores in scorer.scores(going):
                    token = sampling.next_token(scores, seed_of(seed, "generate", number, done))
                    if token in ends:
                        texts[number].is_ended = True
                    else:
                        texts[number].tokens.append(token)
    return texts


class PartitionScorer:
    """Scores tokens through the partitions of a model, by a forward over whole rows for each.

    Args:
        run: The run, with no partition resident.
        form: How texts are handed to its model.
    """

    at_once: int | None = None

    def __init__(self, run: Run, form: TextForm) -> None:
        self._run, self.form = run, form
        self._only: ActivePartition | None = None
        # What is between two partitions is in memory: as many texts at a time as have room there.
        sizes = [sum(spec.sample_bytes for spec in specs) for specs in run.workload.chain.boundaries]
        cuts = [part.start for part in run.plan.partitions[1:]]
        largest = max((sizes[cut] for cut in cuts), default=0)
        room = run.session.device.buffer_sizes.boundary_bytes // 2
        self._most = max(1, room // largest) if largest else max(1, run.plan.partitions[0].batch)

    @property
    def residency(self) -> Residency:
        """The only partition's tensors on the device, while it is ready."""
        assert self._only is not None, "there is one partition, and it is ready"
        return self._only.residency

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

    def scores(self, texts: dict[int, Continuation]) -> Iterator[tuple[int, Tensor]]:
        """See `Scorer.scores`."""
        numbers = list(texts)
        for begin in range(0, len(numbers), self._most):
            chosen = numbers[begin : begin + self._most]
            found = self._scores_of([texts[number] for number in chosen])
            for place, number in enumerate(chosen):
                yield number, found[place]

    def _scores_of(self, texts: list[Continuation]) -> dict[int, Tensor]:
        partitions, output = self._run.partitions, self._run.workload.task.output
        tensors, wanted = self.form.rows(texts)
        found: dict[int, Tensor] = {}

        def pick(outputs: tuple[Tensor, ...], labels: Tensor) -> tuple[list[int], Tensor]:
            rows = labels.reshape(-1) != UNWANTED
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
