"""The fields of a run's result: the content of `result.json`."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ResultFields:
    """Fields of a result: the content of `result.json`.

    `schema_version` rises when a key changes its meaning or goes; keys may be added without that.

    Exits are numbered from 1, as `export --exit` takes them; `chosen_exit` is the exit that `export --exit auto` takes.

    `compiled` holds the number of compiled `layers`, the number of `functions` that they share, and the `seconds` of compiling in the
    last process, which `seconds` of the run leave out; empty without --compile.

    `training` holds the optimizer and its settings: those that were asked for, and the defaults of the others.

    `stopped_after` is the epoch, and `stopped_step` the optimizer step, after which training ended early (--early-stop); `best_epoch` and
    `best_step` are those of the validation that was best by --monitor. Where it was within an epoch (--eval-every) there is a step alone.
    `weights_of` says whether the weights are the "last" or the "best".

    `skipped_steps` counts the steps in fp16 that were skipped because a gradient overflowed.

    `context` holds the `bytes` that the process held on a GPU outside PyTorch's allocator, and how that was `found`: by the driver's list of
    processes (`nvml`), by what the device held more after the start (`difference`), or not at all (`assumed`); empty on the CPU.

    `compared` is "yes" where the model's outputs, loss, gradients and buffers on a few samples were compared with those of its layers
    before training, else "no".

    `batch_norm` says how many BatchNorm `layers` normalised over `samples` of a `batch` at least; empty where all saw the whole batch.

    `weights` says of the pretrained weights that training began with their `source` and `sha256`, how many tensors were `loaded` (`cast`
    of them from another type), which tensors of the model are `new`, and which of theirs were `left_out`; empty where there were none.

    `meta` says of the meta model (`incubate`) how many `params` it has, its `epochs`, `seconds`, `peak_bytes`, `train_loss`, `test_loss`
    and `test_accuracy`; its seconds, bytes and MACs are in those of the run.

    `notes` say what else was done for each micro-batch, and in plain PyTorch once for a batch.

    `adapter` is the folder in which a run with adapters leaves them as peft has them.

    `samples` holds each `prompt` of --sample, and what the model said after it `before` training and `after` it.

    `module_state` holds Python attributes of modules that forwards changed, as they were at the end: they are not in `weights_file`.

    `scores` holds what the trained model reaches on the parts `val` and `test`, as far as there are such and the task has such scores:
    loss, accuracy, top5, f1, confusion (a row of counts for each right class), miou, average_precision, mse, mae, r2, perplexity, or
    metrics of your own. `val_loss` and `val_accuracy` are of the last epoch; `test_loss` and the like are those in `scores`.

    `skipped_samples` holds the `count` of broken samples that were left out (--skip-broken), and the `names` of the first 100.

    `val_data` and `test_data` name the sources of these parts, where they have sources of their own.

    `data_parts` says how many samples each part of the data has, and which parts were split off. `preparation`
    holds what samples are made with that follows from the training data: columns, classes, mean and std. `form` says what samples and targets
    are, for whoever uses the model without them: shapes, types, kind of targets, names of classes. `workers` is the number of processes
    that read them; their memory is in `host_peak_bytes` alone.

    `transformers_folder` is what `from_pretrained` loads, where the model is one of transformers.

    `plain_bytes` is the predicted peak of a plain PyTorch loop with the same batch; None where it is not known (`neuroflux`).

    Sizes are in bytes; peaks are above the floor, the memory that the process held before training. `test_accuracy`, or `perplexity`
    where the data is text, belongs to `weights_file`. Values that were not measured are None.
    """

    schema_version: int = 1
    method: str
    model: str
    data: str
    val_data: str | None = None
    test_data: str | None = None
    seed: int
    precision: str = "fp32"
    device: str
    budget_bytes: int
    budget_scope: str
    context: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    floor_bytes: int
    peak_bytes: int
    host_peak_bytes: int
    predicted_peak_bytes: int
    reserve_bytes: int
    plain_bytes: int | None = None
    check: Mapping[str, int]
    compared: str = "no"
    batch_norm: Mapping[str, int] = dataclasses.field(default_factory=dict)
    module_state: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    training_state_bytes: int
    partitions: Sequence[Mapping[str, Any]]
    epochs: Sequence[int]
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stopped_after: int | None = None
    stopped_step: int | None = None
    best_epoch: int | None = None
    best_step: int | None = None
    weights_of: str = "last"
    seconds: float
    compiled: Mapping[str, float] = dataclasses.field(default_factory=dict)
    samples_per_second: float
    train_loss: float | None
    val_loss: float | None
    val_accuracy: float | None
    task: str = "classification"
    loss: str = "auto"
    scores: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    test_loss: float | None
    test_accuracy: float | None
    test_f1: float | None
    perplexity: float | None = None
    macs: int
    exits: Sequence[Mapping[str, Any]] = ()
    chosen_exit: int | None = None
    bytes_read: int
    bytes_written: int
    drive_tbw: float | None = None
    oom_retries: int
    skipped_steps: int = 0
    skipped_samples: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"count": 0, "names": []})
    resumed: int
    workdir: str
    weights_file: str
    transformers_folder: str | None = None
    adapter: str | None = None
    samples: Sequence[Mapping[str, str]] = ()
    preprocessing: str
    data_parts: str = ""
    preparation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    form: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    workers: int = 0
    versions: Mapping[str, str]
