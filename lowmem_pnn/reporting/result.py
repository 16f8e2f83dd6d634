"""The result of a run: the content of `result.json`, and the page that people read."""

import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lowmem_pnn.engine.stalls import describe_stalls
from lowmem_pnn.pretrained.matching import describe_weights
from lowmem_pnn.pretrained.model_file import load_into
from lowmem_pnn.reporting.tables import describe_skipped, layer_range, text_table
from lowmem_pnn.units import format_bytes

# Scores on the test data that not every task has: what people call them, and their format.
_MORE_SCORES = {
    "miou": ("mean IoU", ".3f"), "average_precision": ("average precision", ".3f"), "mse": ("MSE", ".4g"), "mae": ("MAE", ".4g"),
    "r2": ("R2", ".3f"),
}  # fmt: skip
_KNOWN = (*_MORE_SCORES, "loss", "accuracy", "f1", "top5", "perplexity", "confusion")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of a run: the content of `result.json`.

    `schema_version` rises when a key changes its meaning or goes; keys may be added without that.

    Exits are numbered from 1, as `export --exit` takes them; `chosen_exit` is the exit that `export --exit auto` takes.

    `compiled` holds the number of compiled `layers`, the number of `functions` that they share, and the `seconds` of compiling in the
    last process, which `seconds` of the run leave out; empty without --compile.

    `training` holds the optimizer and its settings: those that were asked for, and the defaults of the others.

    `stopped_after` is the epoch, and `stopped_step` the optimizer step, after which training ended early (--early-stop); `best_epoch` and
    `best_step` are those of the validation that was best by --monitor. Where it was within an epoch (--eval-every) there is a step alone.
    `weights_of` says whether the weights are the "last" or the "best".

    `skipped_steps` counts the steps in fp16 that were skipped because a gradient overflowed.

    `compared` is "yes" where the model's outputs, loss, gradients and buffers on a few samples were compared with those of its layers
    before training, else "no".

    `batch_norm` says how many BatchNorm `layers` normalised over `samples` of a `batch` at least; empty where all saw the whole batch.

    `weights` says of the pretrained weights that training began with their `source` and `sha256`, how many tensors were `loaded` (`cast`
    of them from another type), which tensors of the model are `new`, and which of theirs were `left_out`; empty where there were none.

    `adapter` is the folder in which a run with adapters leaves them as peft has them.

    `notes` say what else was done for each micro-batch, and in plain PyTorch once for a batch.

    `module_state` holds Python attributes of modules that forwards changed, as they were at the end: they are not in `weights_file`.

    `scores` holds what the trained model reaches on the parts `val` and `test`, as far as there are such and the task has such scores:
    loss, accuracy, top5, f1, confusion (a row of counts for each right class), miou, average_precision, mse, mae, r2, perplexity, or
    metrics of your own. `val_loss` and `val_accuracy` are of the last epoch; `test_loss` and the like are those in `scores`.

    `skipped_samples` holds the `count` of broken samples that were left out (--skip-broken), and the `names` of the first 100.

    `data_parts` says how many samples each part of the data has, and which parts were split off. `preparation`
    holds what samples are made with that follows from the training data: columns, classes, mean and std. `form` says what samples and targets
    are, for whoever uses the model without them: shapes, types, kind of targets, names of classes. `workers` is the number of processes
    that read them; their memory is in `host_peak_bytes` alone.

    `plain_bytes` is the predicted peak of a plain PyTorch loop with the same batch; None where it is not known (`neuroflux`).

    Sizes are in bytes; peaks are above the floor, the memory that the process held before training. `test_accuracy`, or `perplexity`
    where the data is text, belongs to `weights_file`. Values that were not measured are None.
    """

    schema_version: int = 1
    method: str
    model: str
    data: str
    seed: int
    precision: str = "fp32"
    device: str
    budget_bytes: int
    budget_scope: str
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
    oom_retries: int
    skipped_steps: int = 0
    skipped_samples: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"count": 0, "names": []})
    resumed: int
    workdir: str
    weights_file: str
    adapter: str | None = None
    preprocessing: str
    data_parts: str = ""
    preparation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    form: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    workers: int = 0
    versions: Mapping[str, str]

    def to_json(self) -> str:
        """Return the text of `result.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """Read a result that `to_json` wrote, in this version or another; keys that are not known are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})

    def load(self, model: nn.Module) -> nn.Module:
        """Load the trained weights into a model of the class that was trained.

        Args:
            model: the model, which is changed.

        Returns:
            The same model.

        Raises:
            CheckpointError: the weights are gone, or not of such a model: all that differs is named.
        """
        load_into(model, self.weights_file)
        return model

    def generate(self, prompts: Any, **options: Any) -> Any:
        """Have the language model that was trained go on with texts: `lowmem_pnn.generate(result, prompts, ...)`.

        Args:
            prompts: a text, or several.
            **options: as `lowmem_pnn.generate` takes them.

        Returns:
            What the model said: a text, or a list of texts.
        """
        # By its public name: what comes after training is above results.
        return importlib.import_module("lowmem_pnn").generate(self, prompts, **options)

    def __str__(self) -> str:
        """Return the result for people; the last line names model size, budget and peak."""
        lines = [f"{self.model} on {self.data}, method {self.method}, {self.device}", "", self._partition_table()]
        if self.exits:
            lines += ["", self._exit_table()]
        if self.data_parts:
            lines += ["", f"data: {self.data_parts}"]
        if self.workers:
            lines.append(
                f"samples read by {self.workers} processes of the host, {format_bytes(self.host_peak_bytes)} of host memory in all"
            )
        lines += ["", self._scores(), f"{self.seconds:.1f} s, {self.samples_per_second:.0f} samples/s"]
        best = _moment(self.best_epoch, self.best_step)
        if self.stopped_after is not None or self.stopped_step is not None:
            now = _moment(self.stopped_after, self.stopped_step)
            lines.append(
                f"ended early, after {now}{f' of {max(self.epochs)}' if self.stopped_after is not None else ''}; the best was {best}"
            )
        if self.weights_of == "best":
            lines.append(f"the weights are those of {best}, the best on the validation part")
        if self.precision != "fp32":
            skipped = f", {self.skipped_steps} steps skipped" if self.skipped_steps else ""
            lines.append(f"computed in {self.precision}{skipped}")
        lines.append(self._disk())
        if self.peak_bytes > self.budget_bytes:
            lines.append(f"THE BUDGET WAS PASSED: {format_bytes(self.peak_bytes)} in use, of {format_bytes(self.budget_bytes)}")
        if self.skipped_samples["count"]:
            lines.append(describe_skipped(self.skipped_samples["names"], self.skipped_samples["count"]))
        if self.oom_retries:
            lines.append(f"{self.oom_retries} batches did not fit and were done again with smaller micro-batches")
        if self.compared == "no":
            lines.append("the model in layers was not compared with the model as a whole before training")
        if norm := self.batch_norm:
            lines.append(
                f"BatchNorm: {norm['layers']} layers normalised over as few as {norm['samples']} of the {norm['batch']} samples of a batch, "
                "and plain PyTorch over all of them"
            )
        if self.weights:
            lines.append(describe_weights(self.weights))
        lines += self.notes
        if self.module_state:
            lines.append(
                f"not in the weights, but changed by forwards: {', '.join(self.module_state)} (module_state in result.json)"
            )
        if self.check:
            lines.append(
                f"checked before training: predicted {format_bytes(self.check['predicted_bytes'])}, "
                f"measured {format_bytes(self.check['measured_bytes'])}, unexplained {format_bytes(self.check['unexplained_bytes'])}"
            )
        lines += [
            f"weights: {self.weights_file}",
            *([f"adapter: {self.adapter} (peft's PeftModel.from_pretrained reads it)"] if self.adapter is not None else []),
            f"model {format_bytes(self.training_state_bytes)} (weights, gradients and optimizer state), "
            f"budget {format_bytes(self.budget_bytes)}, peak {format_bytes(self.peak_bytes)}{self._saving()}",
        ]
        return "\n".join(lines)

    def _saving(self) -> str:
        """Return how the peak compares with plain PyTorch's."""
        if self.plain_bytes is None:
            return ""
        saved = f": {1 - self.peak_bytes / self.plain_bytes:.0%} saved" if self.peak_bytes < self.plain_bytes else ""
        return f"; plain PyTorch needs about {format_bytes(self.plain_bytes)}{saved}"

    def _partition_table(self) -> str:
        rows = [
            (
                str(number + 1),
                layer_range(partition["layers"]),
                f"{partition['params']:,}",
                f"{partition['micro_batch']} of {partition['batch']}",
                str(partition["epochs"]),
                format_bytes(partition["predicted_peak_bytes"]),
                format_bytes(partition["peak_bytes"]),
                f"{partition['seconds']:.1f}",
            )
            for number, partition in enumerate(self.partitions)
        ]
        headings = ("partition", "layers", "parameters", "micro-batch", "epochs", "predicted peak", "measured peak", "seconds")
        return text_table(headings, rows)

    def _exit_table(self) -> str:
        """Return the table of early exits, with the chosen one marked."""

        def percent(value: float | None) -> str:
            return "-" if value is None else f"{value:.1%}"

        rows = [
            (
                f"{number}{' chosen' if number == self.chosen_exit else ''}",
                exit["layer"],
                f"{exit['params']:,}",
                percent(exit["val_accuracy"]),
                percent(exit["test_accuracy"]),
                f"{exit['samples_per_second']:.0f}",
            )
            for number, exit in enumerate(self.exits, 1)
        ]
        return text_table(("exit", "after layer", "parameters", "validation", "test", "samples/s"), rows)

    def _scores(self) -> str:
        test = self.scores.get("test", {})
        scores = (
            ("training loss", self.train_loss, ".4g"),
            ("validation loss", self.val_loss, ".4g"),
            ("validation accuracy", self.val_accuracy, ".1%"),
            ("test accuracy", self.test_accuracy, ".1%"),
            ("test F1", self.test_f1, ".3f"),
            ("test loss", self.test_loss if self.test_accuracy is None else None, ".4g"),
            ("perplexity", self.perplexity, ".2f"),
            *((f"test {name}", test.get(key), form) for key, (name, form) in _MORE_SCORES.items()),
            *((f"test {key}", value, ".4g") for key, value in test.items() if key not in _KNOWN and isinstance(value, float)),
        )
        return ", ".join(f"{name} {value:{form}}" for name, value, form in scores if value is not None)

    def _disk(self) -> str:
        """Return the traffic of the drive, and the shares of the training time in which computing waited."""
        text = f"disk: {format_bytes(self.bytes_read)} read, {format_bytes(self.bytes_written)} written"
        waited = [partition.get("waited", {}) for partition in self.partitions]
        seconds = sum(partition["seconds"] for partition in self.partitions)
        kinds = dict.fromkeys(kind for own in waited for kind in own)
        if seconds and kinds:
            text += "; " + describe_stalls({kind: sum(own.get(kind, 0.0) for own in waited) / seconds for kind in kinds})
        return text


def _moment(epoch: int | None, step: int | None) -> str:
    """Return a moment of training in words: an epoch, or a step within one."""
    return f"epoch {epoch}" if epoch is not None or step is None else f"step {step}"
