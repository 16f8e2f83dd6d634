"""Checks of options that only the model, the data and the task allow."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from lowmem_pnn.config.faults import suggest
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.methods import SplitName
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.model.layer import is_rowwise
from lowmem_pnn.optim.low_precision import MIN_QUANTIZED_SIZE, is_quantized
from lowmem_pnn.samples.epochs import all_samples
from lowmem_pnn.sources.dataset import Dataset
from lowmem_pnn.sources.splits import Split
from lowmem_pnn.sources.subsets import labels_of
from lowmem_pnn.tasks.own_loss import OwnTask
from lowmem_pnn.tasks.scores import DIRECTIONS
from lowmem_pnn.tasks.task import Task
from lowmem_pnn.workload.workload import Workload

# Samples whose targets a loss, and metrics, of the user's own are tried on; two, the fewest that say something, where the outputs of more
# have more bytes than this: no budget is enforced yet.
_EXAMINED = 4
_EXAMINED_BYTES = 64 * 2**20
# Samples all over the data whose targets a loss is tried on too where they differ, so many times as many as at first.
_LOOKED_AT = 64
_LOOKED_AT_BYTES = 16 * 2**20
_GROUPS = 8
# Of the float32 numbers that outputs are made up as.
_ELEMENT_BYTES = 4


def check_mixing(config: FitConfig, dataset: Dataset) -> None:
    """Refuse samples that cannot be mixed.

    Args:
        config: Options of the run, which has batches mixed.
        dataset: Open data set.

    Raises:
        ConfigError: It has other samples.
    """
    shape, dtype = dataset.sample_shape, str(dataset.dtype).removeprefix("torch.")
    if dataset.structure is not None:
        raise ConfigError(f"{config.mixing}: samples of data {dataset.name} are several tensors, and one is mixed; leave it out")
    if not dataset.dtype.is_floating_point:
        raise ConfigError(f"{config.mixing}: samples of data {dataset.name} are {dtype}, which have no mean; leave it out")
    if config.cutmix is not None and len(shape) != 3:
        raise ConfigError(
            f"--cutmix is for images (channels, height, width), and samples of data {dataset.name} are {shape}; give --mixup, or leave it out"
        )


def try_own(task: Task, train: Split, outputs: tuple[TensorSpec, ...]) -> None:
    """Try a loss and metrics of the user's own on made-up outputs of a few samples.

    Args:
        task: Task of the run.
        train: Training samples.
        outputs: Output tensors of the model.

    Raises:
        ConfigError: One of them cannot be used.
    """
    if not isinstance(task, OwnTask) and task.metrics is None:
        return
    sample_bytes = _ELEMENT_BYTES * sum(math.prod(spec.shape) for spec in outputs)
    fit = _EXAMINED_BYTES // max(1, sample_bytes)
    targets = train.batch(range(min(max(2, fit), _EXAMINED, len(train))))[1]
    if isinstance(task, OwnTask):
        task.examine([targets, *_varied(task, train, len(targets), fit)], outputs)
    if task.metrics is not None:
        task.metrics.check_names(task.task_score_names(outputs))
        if len(targets) <= fit:  # what a loss has to be asked, metrics may say as they are used
            task.metrics.examine(targets, outputs)


def _varied(task: Task, train: Split, size: int, fit: int) -> list[Tensor]:
    """Return targets of further samples, from all over the data and as different as they are there, a few at a time.

    Args:
        task: Task of the run.
        train: Training samples.
        size: Samples at a time.
        fit: Samples whose outputs have no more bytes than are made up at once.
    """
    count = all_samples(train)
    looked_at = min(count, _LOOKED_AT, max(size, _LOOKED_AT_BYTES // max(1, task.targets.sample_bytes)))
    numbers = np.unique(np.linspace(0, count - 1, looked_at).astype(np.int64))
    # Some at a time: a data set may have to read its samples for their targets.
    kept = torch.cat([labels_of(train, numbers[begin : begin + size]) for begin in range(0, len(numbers), size)])
    # Rare ones among them would be lost between equal ones.
    different = {target.numpy().tobytes(): target for target in kept.contiguous()}
    chosen = [*different.values()][: max(size, min(_GROUPS * size, fit))]
    groups = [torch.stack(chosen[begin : begin + size]) for begin in range(0, len(chosen), size)]
    return [group for group in groups if len(group) > 1]


def check_effects(config: FitConfig, model: nn.Module, spec: str) -> None:
    """Refuse options about the form of tensors that no tensor of a model has.

    Args:
        config: Options of the run.
        model: The model, of which parameters that do not learn ask for no gradient.
        spec: What the model is called in messages.

    Raises:
        ConfigError: One of them has no effect.
    """
    if config.channels_last and all(parameter.dim() != 4 for parameter in model.parameters()):
        raise ConfigError(f"--channels-last has no effect here: {spec} has no convolutions of maps (C, H, W); leave it out")
    learning = (parameter for parameter in model.parameters() if parameter.requires_grad)
    if config.optimizer_state != "fp32" and not any(
        is_quantized(one, also_bfloat16=config.weights_dtype == "bf16") for one in learning
    ):
        raise ConfigError(
            f"--optimizer-state {config.optimizer_state} has no effect here: {spec} has no float32 parameters of "
            f"{MIN_QUANTIZED_SIZE} elements or more that learn; leave it out"
        )


def check_validations(
    config: FitConfig, task: Task, outputs: tuple[TensorSpec, ...], dataset: Dataset, splits: dict[SplitName, Split]
) -> None:
    """Refuse what is to go by the validation part, where it cannot.

    Args:
        config: Options of the run.
        task: Task of the run.
        outputs: Output tensors of the model.
        dataset: Open data set.
        splits: Parts of it.

    Raises:
        ConfigError: There is no such part, it has no such score, or is measured too late.
    """
    if config.watches and "val" not in splits:
        raise ConfigError(
            f"--early-stop and --keep-weights best go by the validation part, and data {dataset.name} has none; give --val-fraction"
        )
    if config.watches:
        check_monitor(config, task, outputs)
    if config.eval_every is not None:
        check_eval_every(config, dataset, splits)


def check_loss_chunk(config: FitConfig, task: Task, chain: Chain, spec: str) -> None:
    """Refuse to compute a loss for some rows at a time where it cannot be.

    Args:
        config: Options of the run.
        task: Task of the run.
        chain: The model in layers.
        spec: What the model is called in messages.

    Raises:
        ConfigError: It takes whole outputs, or the last layer makes no rows apart.
    """
    if config.loss_chunk is None:
        return
    if task.metrics is not None:
        raise ConfigError(
            f"--loss-chunk {config.loss_chunk} measures some rows at a time, and metrics of your own take whole outputs; leave one out"
        )
    if task.rows_per_sample is None:
        raise ConfigError(f"--loss-chunk {config.loss_chunk}: the loss of {task.name} is no sum over rows; leave it out")
    if not is_rowwise(chain.layers[-1]):
        raise ConfigError(
            f"--loss-chunk {config.loss_chunk}: the last layer of {spec}, {chain.layers[-1].name!r}, is not one nn.Linear and "
            "cannot be computed in parts; leave it out"
        )


def check_monitor(config: FitConfig, task: Task, outputs: tuple[TensorSpec, ...]) -> None:
    """Refuse to go by a score that the task does not have, or of which nobody knows whether more is better.

    Args:
        config: Options of the run.
        task: Task of the run.
        outputs: Output tensors of the model.

    Raises:
        ConfigError: It is not known, with near names.
    """
    direction, name = config.monitored
    known = [f"val_{score}" for score in task.score_names(outputs)]
    what = "the loss and metrics given" if isinstance(task, OwnTask) else task.name
    if name not in known:
        raise ConfigError(
            f"--monitor {name} is no score of {what} on the validation part, which has {', '.join(known)}{suggest(name, known)}"
        )
    if direction not in (None, "min", "max"):
        raise ConfigError(f"--monitor {config.monitor}: {direction!r} is none of min, max{suggest(direction, ['min', 'max'])}")
    best = DIRECTIONS.get(name.removeprefix("val_"))
    if direction is None and best is None:
        raise ConfigError(f"--monitor {name}: is more of it better, or less? Give max:{name} or min:{name}")
    if direction is not None and best not in (None, direction):
        raise ConfigError(f"--monitor {config.monitor}: of {name} the {best} is best; give {name}")


def check_eval_every(config: FitConfig, dataset: Dataset, splits: dict[SplitName, Split]) -> None:
    """Refuse validations within epochs that would never come.

    Args:
        config: Options of the run.
        dataset: Open data set.
        splits: Parts of it.

    Raises:
        ConfigError: There is no validation part, or there are too few steps.
    """
    if "val" not in splits:
        raise ConfigError(f"--eval-every measures the validation part, and data {dataset.name} has none; give --val-fraction")
    steps = math.ceil(len(splits["train"]) / config.batch_sizes[-1]) * (config.epochs[-1] + config.recovery_epochs)
    if config.eval_every is not None and config.eval_every >= steps:
        raise ConfigError(
            f"--eval-every {config.eval_every}: training has {steps} steps of {config.batch_sizes[-1]} samples, and is measured at its end "
            "anyway; give fewer"
        )


def check_epochs(workload: Workload) -> None:
    """Refuse data whose epochs differ, by random transforms or by a sampler, where a method learns from the same samples in all of them.

    Args:
        workload: Model, data and method.

    Raises:
        ConfigError: It does.
    """
    _check_draws(workload)
    _check_sampler(workload)


def _check_draws(workload: Workload) -> None:
    """Refuse random transforms where a method learns from what it has once computed of samples, epoch after epoch."""
    if not workload.dataset.is_random or workload.reads_anew:
        return
    method = workload.config.method
    others = {"pnn": "pnn --parallel-sil", "neuroflux": "neuroflux --visits interleaved"}
    own = f" (or {others[method]})" if method in others else ""
    raise ConfigError(
        f"--method {method}: samples of data {workload.dataset.name} are drawn at random whenever they are read, and activations of them are "
        f"kept over epochs; use --method exact or backprop{own}, or take random transforms out of the data set (--augment has some)"
    )


def _check_sampler(workload: Workload) -> None:
    """Refuse a data loader's own sampler where partitions learn one after the other, from the same samples."""
    sampler, method = workload.dataset.sampler, workload.method
    if sampler is None or method.sweeps or (method.num_partitions == 1 and not method.incubates):
        return
    raise ConfigError(
        f"--method {workload.config.method}: the {sampler.name} of the data loader draws other samples in every epoch, and partitions learn "
        "one after the other; use --method exact or backprop, or give a loader with shuffle=True or False"
    )
