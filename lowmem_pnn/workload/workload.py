"""The workload: model, data and method of a run, open and cut into layers, with nothing allocated yet."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from lowmem_pnn.adapters.prepared_model import prepared
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.methods import Learning, Method, Objective, SplitName, Sweep, Visit, program_of
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.model.layer import is_of_head
from lowmem_pnn.optim.lr_schedules import scheduled_rate
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.pretrained.freezing import check_patterns, matching
from lowmem_pnn.pretrained.matching import PretrainedWeights
from lowmem_pnn.samples.batch_mixer import BatchMixer
from lowmem_pnn.samples.epochs import epochs_of
from lowmem_pnn.samples.readers import Readers
from lowmem_pnn.seeds import seed_of, seeded
from lowmem_pnn.sources.dataset import Dataset
from lowmem_pnn.sources.splits import Split
from lowmem_pnn.tasks import Task
from lowmem_pnn.workload.behaviour import Behaviour, behaviour_of
from lowmem_pnn.zoo.model_source import ModelSource

# Batch size that `lr` is meant for where the batch is chosen: the default one.
_BATCH_OF_LR = 64
# Outputs of frozen layers are kept on disk where they take no more than so many times the bytes of the samples.
_MOST_GROWTH = 4


@dataclass(frozen=True)
class Workload:
    """Model, data and method of a run.

    Args:
        config: options of the run.
        source: constructor of the model.
        dataset: source of the samples.
        splits: parts of the data set: `train`, and `val` and `test` where there are such.
        method: training method.
        task: what the model learns, by which loss.
        chain: the model in layers; its tensors are on the meta device until they are resident.
        bare: the same chain without auxiliary heads.
        pretrained: pretrained weights that training begins with, matched with the model; None for the constructor's values.
        early: the same workload for the epochs in which what is unfrozen later is frozen; None without `--unfreeze-at`.
        parts: the chain with parts of large blocks as layers of their own, where the method does not cut there; else None.
        compiled: number of compiled `layers`, of `functions` that they share, and `seconds` it took to compile them; empty where
            layers run as they are.
        unstored: modules whose weights are kept as they are, whatever smaller type is asked for: the forward reads them by itself.
    """

    config: FitConfig
    source: ModelSource
    dataset: Dataset
    splits: dict[SplitName, Split]
    method: Method
    task: Task
    chain: Chain
    bare: Chain
    pretrained: PretrainedWeights | None = None
    early: "Workload | None" = None
    parts: Chain | None = None
    compiled: Mapping[str, float] = field(default_factory=dict)
    unstored: frozenset[str] = frozenset()

    @property
    def rows_per_sample(self) -> int:
        """Rows of outputs of one sample: 1, or its tokens."""
        return self.task.rows_per_sample or 1

    @property
    def mixer(self) -> BatchMixer | None:
        """What mixes the samples of training batches; None where they are as they are."""
        config = self.config
        if config.mixing is None:
            return None
        return BatchMixer(config.seed, self.task.targets.num_classes, config.mixup, config.cutmix)

    @property
    def needs_whole_batch(self) -> bool:
        """Whether the loss of a batch is not made up of those of its parts, so that it has to go through at once."""
        return self.task.needs_whole_batch or self.config.local_loss != "cross-entropy"

    @property
    def draws_anew(self) -> bool:
        """Whether training samples are other ones in every epoch: augmented, or with random transforms of the data set."""
        return self.config.augment != "none" or self.dataset.is_random

    @property
    def reads_anew(self) -> bool:
        """Whether all that learns from samples sees those of each epoch, by whatever plan: no activations are kept from epoch to epoch."""
        method, config = self.method, self.config
        whole = method.num_partitions == 1 and not method.incubates
        return whole or method.sweeps or method.partitions_are_independent or config.visits == "interleaved"

    @property
    def readers_peak_bytes(self) -> int:
        """The most private memory that processes which read samples had together."""
        readers = getattr(self.splits["train"], "readers", None)
        return readers.peak_bytes if isinstance(readers, Readers) else 0

    @property
    def training_splits(self) -> dict[SplitName, int]:
        """Names of the parts that training reads, with their numbers of samples."""
        return {name: len(self.splits[name]) for name in ("train", "val") if name in self.splits}

    def batch_norms(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return the names of the BatchNorms that normalise over the samples before them in train mode, or, without statistics, in any.

        Args:
            start: first layer.
            stop: layer after the last; None for the chain's end.
        """
        kind = nn.modules.batchnorm._BatchNorm
        return [
            name
            for layer in self.chain.layers[start:stop]
            for name, module in layer.module.named_modules()
            if isinstance(module, kind)
            and (layer.modes.of(True).get(name, True) or module.running_mean is None)
            and not is_of_head(name)
        ]

    @property
    def data_stamp(self) -> str:
        """The data's fingerprint, and behind it the number of samples of each part: what a resume compares."""
        return " ".join([self.dataset.fingerprint, *(f"{name}={len(split)}" for name, split in self.splits.items())])

    def program(self, spans: Sequence[tuple[int, int]], splits: Collection[SplitName] | None = None) -> list[Visit | Sweep]:
        """Return the visits and sweeps of the whole run, for a model that may be frozen in part.

        Args:
            spans: first layer of each partition, and the layer after its last.
            splits: parts of the data that training reads; None for all of them.
        """
        at_first = None if self.early is None else self.early._learning(self.early.fixed_layers)
        # What the model's own code freezes stays frozen, and runs in every epoch: its outputs are not written a second time.
        learning = self._learning(self.fixed_layers if at_first is None else 0)
        return program_of(self.method, spans, self.training_splits if splits is None else splits, learning, at_first)

    def _learning(self, fixed_layers: int) -> Learning:
        return Learning(self.learns, lambda layer: self.behaviour(layer).changes_buffers, fixed_layers)

    @property
    def _has_other_samples(self) -> bool:
        """Whether samples of one epoch are others than those of another: as the data set, or a sampler, draws them, or as some are left out."""
        return self.dataset.is_random or epochs_of(self.splits["train"]) is not None

    @cached_property
    def fixed_layers(self) -> int:
        """Number of first layers whose outputs are the same in every epoch, and are written once for all of them; 0 for none.

        With `--unfreeze-at` these are the epochs before it. The layers are frozen, draw nothing at random, change no buffers, normalise
        over no batch, and see samples that are not augmented or mixed. Outputs that are much larger than the samples are not kept: then
        it is fewer layers.
        """
        config = self.config
        if self.early is not None:
            return self.early.fixed_layers
        if (
            not (self.method.sweeps and config.cache_frozen)
            or config.changes_samples
            or self._has_other_samples
            or all(self.learns)
        ):
            return 0
        if (config.unfreeze_at or config.value_for("epochs", 0)) < 2:
            return 0
        sizes = [sum(spec.sample_bytes for spec in specs) for specs in self.chain.boundaries]
        found = 0
        for number in range(len(self.learns)):
            if self.learns[number] or not self.behaviour(number).is_fixed or self.batch_norms(number, number + 1):
                break
            if sizes[number + 1] <= _MOST_GROWTH * sizes[0]:
                found = number + 1
        return found

    @cached_property
    def learns(self) -> tuple[bool, ...]:
        """For each layer, whether any of its parameters learns."""
        return tuple(any(one.requires_grad for one in layer.parameters().values()) for layer in self.chain.layers)

    def behaviour(self, layer: int) -> Behaviour:
        """Return what a forward of a layer does in train mode.

        Args:
            layer: number of the layer.
        """
        if layer not in self._behaviours:
            self._behaviours[layer] = behaviour_of(self.chain.layers[layer], self.chain.boundaries[layer])
        return self._behaviours[layer]

    @cached_property
    def meta_models(self) -> dict[tuple[tuple[int, int], ...], Any]:
        """Meta models that were made of this workload (`meta_model`), by the spans of the partitions."""
        return {}

    @cached_property
    def _behaviours(self) -> dict[int, Behaviour]:
        return {}

    def optimizer(self, partition: int) -> OptimizerSpec:
        """Return a partition's optimizer."""
        config = self.config
        return OptimizerSpec(
            config.value_for("optimizer", partition),
            config.value_for("lr", partition),
            config.momentum,
            config.weight_decay,
            config.fused,
            config.optimizer_state,
            config.seed,
            self.rates,
            config.betas,
            config.eps,
            self.without_decay,
            config.weights_dtype,
        )

    @cached_property
    def without_decay(self) -> frozenset[str]:
        """Names, as they are stored, of the parameters that weight decay leaves alone.

        Raises:
            ConfigError: a pattern matches no parameter.
        """
        chain, patterns = self.bare, self.config.no_decay or ()
        shapes = {name: one.shape for layer in self.chain.layers for name, one in layer.parameters().items()}
        check_patterns("--no-decay", patterns, [*dict.fromkeys(shapes), *chain.unused])
        found = {chain.owner_of(name) for pattern in patterns for name in matching(pattern, shapes)}
        if self.config.no_decay_norms:
            found |= {name for name, shape in shapes.items() if len(shape) < 2 or name.rpartition(".")[2] == "bias"}
        return frozenset(self.chain.owner_of(name) for name in found)

    def steps(self, planned: int) -> int:
        """Return the optimizer steps of a training that has so many in its epochs.

        Args:
            planned: steps of all epochs.
        """
        return planned if self.config.max_steps is None else min(planned, self.config.max_steps)

    @property
    def samples_not_reached(self) -> int:
        """Training samples of the last epoch that come after its last step (`--max-steps`)."""
        most, samples = self.config.max_steps, len(self.splits["train"])
        if most is None:
            return 0
        batch: int = self.config.value_for("batch_size", 0)
        steps = math.ceil(samples / batch)
        epochs: int = self.config.value_for("epochs", 0)
        return max(0, samples - (most - (epochs - 1) * steps) * batch)

    @cached_property
    def rates(self) -> tuple[tuple[str, float], ...]:
        """Learning rates of the parameters that learn at one of their own, by the names under which they are stored."""
        learning, rates = self._learning_names, dict[str, float]()
        for pattern, rate in self.config.lr_for.items():
            rates |= {learning[name]: rate for name in matching(pattern, learning)}
        return tuple(sorted(rates.items()))

    @property
    def _learning_names(self) -> dict[str, str]:
        """Names of the parameters that learn, and those under which they are stored."""
        chain = self.bare
        return {
            name: chain.owner_of(name) for layer in chain.layers for name, one in layer.parameters().items() if one.requires_grad
        }

    def check_rates(self) -> None:
        """Refuse patterns of learning rates that match nothing; what is frozen at first (`early`) may have a rate for later.

        Raises:
            ConfigError: a pattern matches no parameter, or none that ever learns.
        """
        chain, patterns = self.bare, self.config.lr_for
        names = [*dict.fromkeys(name for layer in chain.layers for name in layer.parameters()), *chain.unused]
        check_patterns("--lr-for", patterns, names)
        for pattern in patterns:
            if not matching(pattern, self._learning_names):
                raise ConfigError(f"--lr-for {pattern!r} matches only parameters that are frozen; leave it out")

    def learning_rate(
        self, partition: int, step: int, total_steps: int, batch: int | None = None, base: float | None = None
    ) -> float:
        """Return a partition's learning rate.

        Where the batch is `auto`, `lr` is meant for 64 samples, and follows the batch: in proportion with sgd (Goyal et al. 2017,
        section 2.1), as its square root with adam and adamw (Malladi et al. 2022).

        Args:
            partition: number of the partition.
            step: optimizer steps before this one, from 0.
            total_steps: optimizer steps of the training that the schedule covers.
            batch: samples per step; None where it is as asked.
            base: rate that the schedule is applied to; None for the partition's own.
        """
        config = self.config
        rate: float = config.value_for("lr", partition) if base is None else base
        if config.batch_size == "auto" and batch is not None:
            share = batch / _BATCH_OF_LR
            rate *= share if config.value_for("optimizer", partition) == "sgd" else math.sqrt(share)
        return scheduled_rate(config.lr_schedule, rate, config.min_lr, step, total_steps, config.warmup_steps)

    def objective(self, plan: Plan, partition: int) -> Objective:
        """Return what a partition learns."""
        boundary = self.chain.laid_out[plan.partitions[partition].stop]
        return self.method.objective(partition, len(plan.partitions), boundary, self.task)

    def head(self, number: int) -> nn.Module | None:
        """Return the auxiliary head of a layer, as drawn after `torch.manual_seed(seed_of(config.seed, "head", number))`."""
        with seeded(seed_of(self.config.seed, "head", number)):
            return self.method.head(self.chain, number, self.task.head_size or 0, self.dataset.targets.kind == "tokens")

    def build_model(self, seed: int, given: Collection[str] = ()) -> nn.Module:
        """Build the model with the values that its constructor gives it under `seeded(seed)`, prepared as the options say.

        Args:
            seed: seed of the values.
            given: names of tensors that get their values later, and may be zeros till then.
        """
        with seeded(seed):
            model = self.source.build_but(given)
            return model if self.source.is_prepared else prepared(model, self.config, unstored=self.unstored)
