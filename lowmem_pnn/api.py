"""The public functions: `fit`, `plan`, `evaluate`, `predict`, `export`, `load`, `load_weights`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Unpack

from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.defaults import unasked_method
from lowmem_pnn.config.gpu_description import GpuDescription
from lowmem_pnn.device.support import budget_on
from lowmem_pnn.errors import LowMemError
from lowmem_pnn.exporting.export_formats import ExportFormat
from lowmem_pnn.inference.evaluate import evaluate_run
from lowmem_pnn.inference.export import export_run
from lowmem_pnn.inference.load import folder_of, given_model, load_run, remember
from lowmem_pnn.inference.predict import predict_run
from lowmem_pnn.inference.samples import PartName
from lowmem_pnn.memory.available import budget_on_described
from lowmem_pnn.pretrained.model_file import load_into
from lowmem_pnn.preview.preview import preview
from lowmem_pnn.reporting.plan_report import PlanReport
from lowmem_pnn.reporting.progress import Display, default_display
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.asked_run import asked_run
from lowmem_pnn.run.callbacks import Callback, checked_callbacks
from lowmem_pnn.run.process import Process
from lowmem_pnn.settings.fit_options import FitOptions
from lowmem_pnn.tasks import Own, OwnLoss, OwnMetrics
from lowmem_pnn.training.start import OpenInputs, begin
from lowmem_pnn.training.start import resume as resume_training
from lowmem_pnn.workload.inputs import Model, name_of_weights, names_of, python_inputs, with_named_parts

# Arguments of `fit` that a plan does not depend on.
_OF_A_RUN = ("workdir", "resume", "overwrite", "display", "verbose", "callbacks")


def fit(
    model: Model,
    train: Any,
    val: Any = None,
    *,
    max_gpu_mem: str | int,
    test: Any = None,
    loss: str | OwnLoss = "auto",
    metrics: OwnMetrics | None = None,
    weights: str | Path | Mapping[str, torch.Tensor] | None = None,
    workdir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
    verbose: bool | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Unpack[FitOptions],
) -> Result:
    """Train a model within a memory budget, as the command `lowmem-pnn fit` does.

    Args:
        model: a name as the command takes it, a function that builds the model, or a model. If the model does not fit in
            memory, pass a function or a name: the model is then never built whole in memory.
        train: a data set's name as the command takes it, a map-style torch data set of (x, y), or of dictionaries with a label and one
            value, or several that the model takes by their names, a torch `DataLoader` of one, whose batch size, order and collation are
            taken, a pandas `DataFrame` with the option `target`, a data set of scikit-learn, or a tuple (x, y) of tensors, arrays, tables
            or lists: x (N, ...) numbers, which reach the model as float32 (or, where it looks them up, as int64), y (N, ...) class numbers,
            labels, values or masks; with a loss of your own any tensors, or tuples and dictionaries of them.
        val: a data set, its name, a loader or a tuple to validate on; None takes the validation part that `train` names, or else
            `val_fraction` of `train`.
        max_gpu_mem: the budget, as a size ("2GB"), in bytes, or as a share of what is free now ("75%", "auto").
        test: a data set, its name, a loader or a tuple to test on after training.
        loss: a loss by name, or a function of the model's outputs and the targets, which returns the mean over samples, or a pair (sum,
            count): then the gradient of a batch is that of all sums over all counts, whatever its micro-batches.
        metrics: functions of the model's outputs and the targets by name, which return a pair (sum, count), or torchmetrics objects,
            beside the scores of the task: they get what the model returns and a batch's targets, both on the host.
        weights: pretrained weights to begin with, as the option `--weights` takes them, or a `state_dict`; then `method` is "exact" and
            `epochs` 3, if they are not given.
        workdir: the run's folder; None takes the next free one under `runs`, or, to resume, that of the only unfinished run there
            that was begun with the same options.
        resume: go on with a run; options may be given as before, or left out. A finished run gives its result.
        overwrite: replace the run in `workdir`.
        display: is told of the run's progress; None shows it as `verbose` says.
        verbose: whether progress is shown on standard error; None shows it in a terminal and in a notebook.
        callbacks: objects of `lowmem_pnn.Callback`, which are told of the start, steps, epochs, commits and the end.
        **options: other fields of `FitConfig`, as `FitOptions` lists them with their types.

    A model that is given as an object holds the trained weights at the end, which is said; where they are not of its form (another head),
    a line names `result.load(model)`, for a model of that form.

    On Linux glibc's thresholds for giving memory back stay lowered in the process; the memory limit is lifted at the end.

    Returns:
        What `result.json` says, with absolute paths. The trained weights are in `result.weights_file`.

    Raises:
        LowMemError: a subclass that says what was wrong; `exit_code` is the command's.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = fit("mlp:64-32-10", "digits", max_gpu_mem="100MB", epochs=1, workdir=f"{folder}/run", device="cpu")
        >>> result.peak_bytes < 100_000_000
        True
    """
    callbacks = checked_callbacks(callbacks)
    named = {**names_of(model, train, loss), "weights": name_of_weights(weights)}
    given = {"max_gpu_mem": max_gpu_mem, **named, **with_named_parts(train, val, test, options)}
    open_inputs = _inputs(model, train, val, test, loss, metrics, weights)
    display = default_display(verbose) if display is None else display
    asked = asked_run(
        given,
        lambda: configure(**{**given, "max_gpu_mem": budget_on(options.get("device") or "auto", max_gpu_mem)}),
        None if workdir is None else Path(workdir),
        resume=resume,
        overwrite=overwrite,
    )
    process = Process(display=display, callbacks=callbacks)
    if asked.config is None:
        result = resume_training(asked.folder, asked.given, open_inputs, process=process)
    else:
        if (note := unasked_method(asked.config, given)) is not None:
            display.message(note)
        result = begin(asked.config, asked.folder, open_inputs, overwrite=overwrite, process=process)
    assert result is not None, "one process trains all partitions"
    result = result.moved_to(Path(result.workdir).absolute())  # the folder of this process may be another one later
    remember(result.workdir, model)
    if isinstance(model, torch.nn.Module):
        try:
            result.load(model)
            display.message("the model that was given holds the trained weights")
        except LowMemError as error:
            display.message(
                f"the model that was given stays as it is ({error}); result.load(model) loads the weights into one of their form"
            )
    return result


def plan(
    model: Model,
    train: Any,
    val: Any = None,
    *,
    max_gpu_mem: str | int | None = None,
    test: Any = None,
    loss: str | OwnLoss = "auto",
    metrics: OwnMetrics | None = None,
    weights: str | Path | Mapping[str, torch.Tensor] | None = None,
    timing: bool = True,
    gpu: str | None = None,
    **options: Unpack[FitOptions],
) -> PlanReport:
    """Show what `fit` with the same arguments would do; nothing is trained or kept.

    Args:
        model: as for `fit`, and so are `train`, `val`, `test`, `loss`, `metrics` and `weights`.
        train: the data.
        val: a part to validate on.
        max_gpu_mem: as for `fit`; with `gpu` all of its memory by default.
        test: a part to test on.
        loss: the loss.
        metrics: metrics of one's own; what they need of outputs is planned for.
        weights: pretrained weights.
        timing: run layers for a few seconds, within the budget, to say what an epoch of every method takes.
        gpu: a GPU that is not here, to plan for: "8GB,pcie=12,tflops=10,disk=2.5,ram=16GB", of which only the memory is needed; its
            times are computed.
        **options: as for `fit`; what says where a run is kept, and how it is shown (`workdir`, `callbacks` and the like), is left out.

    Returns:
        The partitions, and whether they fit; with `timing` all methods side by side.
    """
    read = {name: value for name, value in options.items() if name not in _OF_A_RUN}
    named = {**names_of(model, train, loss), "weights": name_of_weights(weights)}
    described = None if gpu is None else GpuDescription.parse(gpu)
    device = options.get("device") or "auto"
    budget = budget_on(device, max_gpu_mem) if described is None else budget_on_described(described, device, max_gpu_mem)
    config = configure(max_gpu_mem=budget, **named, **with_named_parts(train, val, test, read))
    return preview(config, _inputs(model, train, val, test, loss, metrics, weights), timing=timing, gpu=described)


def _inputs(model: Model, train: Any, val: Any, test: Any, loss: Any, metrics: OwnMetrics | None, weights: Any) -> OpenInputs:
    """Return what opens model and data; what is named by a text is opened by its name."""
    val, test, loss = (None if isinstance(one, str) else one for one in (val, test, loss))
    state_dict = weights if isinstance(weights, Mapping) else None
    return python_inputs(model, train, val, test, loss=loss, metrics=metrics, state_dict=state_dict)


def evaluate(
    run: str | Path | Result,
    data: Any = None,
    *,
    model: Model | None = None,
    loss: OwnLoss | None = None,
    metrics: OwnMetrics | None = None,
    max_gpu_mem: str | int | None = None,
    device: str | None = None,
    skip_broken: bool = False,
    trust: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Measure the weights of a finished run on its test data, or on any other, within its budget or another.

    Args:
        run: the run's folder, which need not be writable, or its result.
        data: samples and targets, as `predict` takes them; None for the test part of the run's own data.
        model: what builds the model, of a run that was started from Python with a model of its own; runs of this process remember it.
        loss: the loss, of a run that was started from Python with a loss of its own.
        metrics: metrics of one's own, as for `fit`.
        max_gpu_mem: another budget than the run's.
        device: another device than the run's: "cpu", "cuda", "cuda:1" or "auto".
        skip_broken: leave out samples of `data` that cannot be used.
        trust: run code that the run names for its model, data or loss (`file.py:factory`).
        display: is told what is measured, and which scores are left out; None shows it in a terminal and in a notebook.

    Returns:
        `test_loss`, and by task `test_accuracy`, `test_f1` and others, as far as they are finite; see `Result.scores`. Balanced class
        weights, which follow from the training data, are left out of the loss on other data.

    Raises:
        CheckpointError: no run is there, it has not finished, or its files are damaged.
        ConfigError: its data has no test part, it names code and `trust` was not given, or it was started from Python with a model,
            data or a loss of its own that has to be given.
        DataError: the data have no targets, or are of another form than the run's.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = fit("mlp:64-32-10", "digits", max_gpu_mem="100MB", epochs=1, workdir=f"{folder}/run", device="cpu")
        ...     scores = evaluate(result)
        >>> scores["test_accuracy"] == result.scores["test"]["accuracy"]
        True
    """
    return evaluate_run(
        folder_of(run),
        data,
        model=model,
        own=Own(loss, metrics or {}),
        max_gpu_mem=max_gpu_mem,
        device=device,
        skip_broken=skip_broken,
        trust=trust,
        display=display,
    )


def predict(
    run: str | Path | Result,
    data: Any = None,
    out: str | Path | None = None,
    *,
    part: PartName | None = None,
    model: Model | None = None,
    max_gpu_mem: str | int | None = None,
    device: str | None = None,
    skip_broken: bool = False,
    overwrite: bool = False,
    trust: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Predict samples by the model of a finished run, within its budget, one partition at a time.

    Samples are prepared as in training: same size, normalisation and columns.

    Args:
        run: the run's folder, which need not be writable, or its result.
        data: samples, with or without targets: an array, a table or a tuple (x, y); a map-style data set of samples, or of pairs; a
            `DataLoader` of one; a data set's name, a file or a folder, as the command takes them. None takes the run's own data.
        out: FILE.npz, FILE.csv, or a folder for masks as PNG; None gives arrays back.
        part: `train`, `val`, `test` or `all`; None takes the test part, or all of data that has none.
        model: what builds the model, of a run that was started from Python with a model of its own; runs of this process remember it.
        max_gpu_mem: another budget than the run's.
        device: another device than the run's: "cpu", "cuda", "cuda:1" or "auto".
        skip_broken: leave out samples that cannot be used.
        overwrite: replace what is there.
        trust: run code that the run names for its model or data (`file.py:factory`).
        display: is told what is predicted; None shows nothing.

    Returns:
        Arrays by name, in the order of the samples: `scores` of classes (N, classes) and labels (N, labels), which are logits, of tokens
        (N, T, tokens) and of pixels (N, classes, H, W); or `outputs`, where values are predicted, and where the loss is your own, which
        takes the names of a model that returns several; `classes`, their names; `targets`, where the data has them; and `files`, where
        samples are files. With `out` these are in the file, and `out`, `samples` and `data` are returned.

    Raises:
        CheckpointError: no run is there, it has not finished, or its files are damaged.
        ConfigError: the data cannot be used, `out` is there, or does not suit the task; or the model has to be given.
        BudgetError: a layer does not fit in the budget.
        DiskError: the disk is full, or not writable.
    """
    return predict_run(
        path := folder_of(run),
        data,
        part=part,
        out=out,
        model=given_model(path, model),
        max_gpu_mem=max_gpu_mem,
        device=device,
        skip_broken=skip_broken,
        overwrite=overwrite,
        trust=trust,
        display=display,
    )


def load(run: str | Path | Result, model: Model | None = None, *, trust: bool = False) -> torch.nn.Module:
    """Build the model of a finished run, whatever its source, with the trained weights.

    Args:
        run: the run's folder, which need not be writable, or its result.
        model: a model of the class that was trained, or what builds it; None builds what the run names, or what it was started with in
            this process. A model is changed, and may not be the one that is returned (with adapters): go on with that one.
        trust: run code that the run names for its model (`file.py:factory`).

    Returns:
        The model, whole in memory, in eval mode.

    Raises:
        CheckpointError: no run is there, it has not finished, its files are damaged, or the model is another one.
        ConfigError: the run names code and `trust` was not given, or the model has to be given.
    """
    return load_run(path := folder_of(run), given_model(path, model), trust=trust)


def export(
    run: str | Path | Result,
    *,
    to: ExportFormat | None = None,
    merge: bool = False,
    exit: str | int = "auto",
    out: str | Path | None = None,
    model: Model | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Write the model of a finished run, up to one of its exits, for plain PyTorch or for others.

    Args:
        run: the run's folder, which need not be writable if `out` is given, or its result.
        to: "safetensors", weights under the model's own names, which are never whole in memory; "pt2", a `torch.export` program; "onnx";
            "hf", a folder that transformers loads; None writes a program and its weights.
        merge: write weights as the model's own class has them, adapters added in and stored weights decoded, some rows at a time.
        exit: the number of an exit, from 1, the whole model's being the last; "auto" takes the one that the run has chosen.
        out: folder for `model.pt2` (a `torch.export` program of any batch size, in eval mode) and `model.safetensors`; None takes
            `RUN/exit-K`, or `RUN/export`. Files that an earlier export wrote there are replaced, others are not.
        model: what builds the model, of a run that was started from Python with a model of its own; runs of this process remember it.
        trust: run code that the run names for its model or data (`file.py:factory`).

    Returns:
        `exit`, `layer`, `params`, `val_accuracy`, and the files `program` and `weights`; with `to` or `merge` the one `file`, and with `to`
        the `largest_difference` between outputs of the run's model and of the file for a batch, None where nothing can read it.

    Raises:
        CheckpointError: no run is there, it has not finished, or its files are damaged.
        ConfigError: it has no such exit, nothing to merge, or `out` holds something else than an export; the run names code and `trust` was
            not given, or the model has to be given; or the format does not hold the model.
        BudgetError: the format needs the model whole in memory, and it is larger than the run's budget.
        DiskError: the disk is full, or not writable.
    """
    path = folder_of(run)
    return export_run(path, to=to, merge=merge, exit=exit, out=out, model=given_model(path, model), trust=trust)


def load_weights(model: torch.nn.Module, file: str | Path) -> torch.nn.Module:
    """Load trained weights into a model of the same class.

    It is `model.load_state_dict(safetensors.torch.load_file(file), strict=True)`, for models too that ask for the versions of their
    modules (torchvision's MNASNet), which `load_file` does not give.

    Args:
        model: the model, which is changed.
        file: `model.safetensors` of a run, or a file like it.

    Returns:
        The same model.

    Raises:
        CheckpointError: the file cannot be read, or is not of such a model: all that differs is named.
    """
    load_into(model, file)
    return model
