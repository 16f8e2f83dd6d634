"""The task of a run: found from what was asked for and from what the targets of its data are."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.sources.dataset import TASK_OF
from lowmem_pnn.sources.targets import PYTORCH_IGNORED, Targets
from lowmem_pnn.tasks.classification import Classification
from lowmem_pnn.tasks.multilabel import MultiLabel
from lowmem_pnn.tasks.own_loss import OwnLoss, OwnTask
from lowmem_pnn.tasks.own_metrics import GivenMetrics, OwnMetrics
from lowmem_pnn.tasks.regression import Regression, RegressionLoss
from lowmem_pnn.tasks.task import Task

OUTPUT_NAMES = ("logits", "out")
"""What models call the tensor that losses by name are taken of, where they return several."""

_LOSSES = {
    "classification": ("cross-entropy",),
    "segmentation": ("cross-entropy",),
    "multilabel": ("bce",),
    "regression": ("mse", "l1", "smooth-l1", "huber"),
}

_MIXING = ("mixup", "cutmix")


@dataclass(frozen=True)
class Own:
    """Loss and metrics that were given as Python functions.

    Args:
        loss: The loss; None for one of the task's own.
        metrics: Metrics by name, beside those of the task.
    """

    loss: OwnLoss | None = None
    metrics: OwnMetrics = field(default_factory=dict)


def make_task(
    config: FitConfig,
    targets: Targets,
    own: Own,
    chain: Chain,
    weights: Sequence[float] | None = None,
) -> Task:
    """Return the task of a run, with the metrics that were given.

    Args:
        config: Options of the run.
        targets: Form of the targets.
        own: Loss and metrics of the user's own.
        chain: The model, for what it returns.
        weights: Weights of the classes, or labels, where there are such.

    Raises:
        ConfigError: An option has no meaning for the task, or a metric has the name of one of its scores.
    """
    task = _make_task(config, targets, own, chain, weights)
    if own.metrics:
        task.metrics = GivenMetrics(own.metrics, targets, chain.rebuild)
    return task


def _make_task(config: FitConfig, targets: Targets, own: Own, chain: Chain, weights: Sequence[float] | None) -> Task:
    name = TASK_OF[targets.kind]
    if own.loss is not None:
        _refuse_options(
            config, f"a loss of your own ({config.loss})", ("label_smoothing", "class_weights", "ignore_index", *_MIXING)
        )
        return OwnTask(targets, own.loss, config.loss, chain.rebuild)
    _check_targets(config, targets)
    output = _output(chain)
    known = _LOSSES[name]
    if config.loss not in ("auto", *known):
        raise ConfigError(
            f"--loss {config.loss} is no loss of {name}, which the targets of the data are for; give {', '.join(known)}, "
            "file.py:function, or another --task"
        )
    if name == "regression":
        _refuse_options(config, "regression", ("label_smoothing", "class_weights", "ignore_index", *_MIXING))
        function: RegressionLoss = "mse" if config.loss == "auto" else config.loss  # type: ignore[assignment]
        return Regression(targets, function, output=output)
    if name == "multilabel":
        _refuse_options(config, "multilabel", ("ignore_index",))
        return MultiLabel(targets, config.label_smoothing, weights, output=output)
    if targets.kind in ("tokens", "mask"):
        _refuse_options(config, "segmentation" if targets.kind == "mask" else "a label for each token", _MIXING)
    return Classification(targets, config.label_smoothing, weights, output=output, mixes=config.mixing is not None)


def _check_targets(config: FitConfig, targets: Targets) -> None:
    """Refuse options about targets that the source of the data has not gone by, since it knows by itself what its targets are."""
    name = TASK_OF[targets.kind]
    if config.target_task not in ("auto", name):
        raise ConfigError(
            f"--task {config.target_task}: the targets of data {config.data} are for {name}, whatever is asked for; leave --task out, or give "
            "data with other targets"
        )
    ignored = PYTORCH_IGNORED if targets.ignored is None else targets.ignored
    if config.ignore_index is not None and targets.are_classes and config.ignore_index != ignored:
        raise ConfigError(
            f"--ignore-index {config.ignore_index} has no effect here: data {config.data} leaves out {ignored}; leave the option out"
        )
    if targets.kind == "probabilities":
        _refuse_options(config, "probabilities of classes", ("ignore_index",))


def _output(chain: Chain) -> int:
    """Return the number of the output tensor that losses by name are taken of: the only one, or that which is called logits or out."""
    form = chain.output_form
    if form is None or len(form.names) == 1:
        return 0
    for name in OUTPUT_NAMES:
        if name in form.names:
            return form.names.index(name)
    raise ConfigError(
        f"the model returns {form} ({', '.join(form.names)}), of which no loss by name knows which to take; give a loss that does (loss=..., "
        "--loss file.py:function), or wrap the model in a module that returns one tensor"
    )


def _refuse_options(config: FitConfig, task: str, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(config, name)
        # A class may have the number 0; other options are left out so.
        if value is not None and (name == "ignore_index" or value not in (0.0, ())):
            raise ConfigError(f"--{name.replace('_', '-')} has no meaning for {task}; leave it out")
