"""Prediction: samples through the partitions of a trained model, one resident at a time, and the answers to their place."""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lowmem_pnn.config.faults import suggest
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.resume import check_trust
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.evaluation.measure import measure
from lowmem_pnn.exporting.out_faults import writing_faults
from lowmem_pnn.inference.answers import (
    BESIDE_OUTPUTS,
    Answers,
    AnswerWriter,
    ArrayWriter,
    MaskWriter,
    TableWriter,
    pack_arrays,
    read_arrays,
)
from lowmem_pnn.inference.load import form_of
from lowmem_pnn.inference.open_parts import SamplesToPredict
from lowmem_pnn.inference.opened_run import opened_run
from lowmem_pnn.inference.other_machine import options_here
from lowmem_pnn.inference.places import Place
from lowmem_pnn.inference.samples import PartName, open_samples
from lowmem_pnn.inference.smaller_budget import within
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.resume import check_plan
from lowmem_pnn.run.run import Run
from lowmem_pnn.run.session import Session
from lowmem_pnn.run.state import State
from lowmem_pnn.sources.dataset import TASK_OF
from lowmem_pnn.sources.targets import TargetOptions
from lowmem_pnn.training.initial_weights import build_weights
from lowmem_pnn.training.setup import open_workload, warm_up_profiler
from lowmem_pnn.workload import Workload
from lowmem_pnn.workload.data_form import DataForm
from lowmem_pnn.workload.inputs import Model
from lowmem_pnn.workload.trained import trained_inputs, trained_source

_PARTS = ("train", "val", "test", "all")


def predict_run(
    path: Path,
    data: Any,
    *,
    part: PartName | None = None,
    out: str | Path | None = None,
    model: Model | None = None,
    max_gpu_mem: str | int | None = None,
    device: str | None = None,
    skip_broken: bool = False,
    overwrite: bool = False,
    trust: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Predict samples by a finished run; arguments are those of `lowmem_pnn.predict`.

    Returns:
        The arrays by name, or, where they went to a file, what was written.
    """
    place = None if out is None else Place.find(out, overwrite)
    if part not in (None, *_PARTS):
        raise ConfigError(f"--part {part!r} is none of {', '.join(_PARTS)}{suggest(str(part), _PARTS)}")
    display = display or Display()
    with ExitStack() as stack:
        stack.callback(display.close)
        display.stage("opening data and model")
        rundir, threads, finished = stack.enter_context(opened_run(path))
        form = form_of(finished, path)
        config = finished.config
        check_trust(config, _not_run(config, data, model), path, trust=trust, again=False)
        config = options_here(config, max_gpu_mem, device)
        source = trained_source(config, model, form.targets.num_classes, f"lowmem_pnn.predict({str(path)!r}, data")
        options = TargetOptions(TASK_OF[form.targets.kind], config.ignore_index)
        opened = open_samples(data, part, config, form, source, finished.result.preparation, options, skip_broken=skip_broken)
        opened.tell(display, finished.result)
        config, inputs = trained_inputs(config, form, source, opened.split, opened.split.targets)
        # Arrays that are given back are read when the budget's limit is lifted.
        folder = stack.enter_context(_temporary() if place is None else place.writing())
        writer = _Writer(folder, place)
        warm_up_profiler()
        with open_workload(config, inputs) as (opened_device, workload):
            check_plan(finished.state, workload, path)
            plan = within(Plan.from_json(finished.state.plan), workload, opened_device.budget_bytes)
            writer.begin(_answers(workload, form, finished.result, opened.split))
            chosen = range(len(workload.chain.boundaries[-1])) if form.targets.kind == "own" else [workload.task.output]

            def bring_down(outputs: tuple[Tensor, ...], targets: Tensor) -> tuple[list[Tensor], Tensor]:
                return [outputs[place].cpu() for place in chosen], targets

            opened_device.enforce()
            rundir.clear()
            with rundir.scratch() as scratch:
                state = State.trained(workload, plan, finished.state.module_state)
                session = Session(opened_device, rundir, threads, display, scratch=scratch)
                trained = path / "model.safetensors"
                weights = build_weights(
                    workload, plan, scratch / "weights", session.counter, trained=trained, metered=opened_device.metered
                )
                with writer.closing():
                    measure(Run(session, workload, plan, weights, state), "test", bring_down, writer.add, may_stop=False)
        written = writer.finish()
    count = len(opened.split)
    return written if place is None else {"out": str(place.path), "samples": count, "data": opened.words}


@contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _not_run(config: FitConfig, data: Any, model: Model | None) -> dict[str, Any]:
    """Return the names of code that a prediction does not run, or that its caller has named."""
    named: dict[str, Any] = {"loss": config.loss}
    if model is not None:
        named["model"] = config.model
    # The caller's word for the same code is as good as naming it again.
    return named if data is None else {**named, "data": config.data, "val_data": "", "test_data": ""}


def _answers(workload: Workload, form: DataForm, result: Result, samples: SamplesToPredict) -> Answers:
    """Return what the model answers."""
    specs, task, kind = workload.chain.boundaries[-1], workload.task, form.targets.kind
    classes = form.classes or (tuple(result.preparation.get("targets", ())) if kind in ("labels", "values") else ())
    if kind != "own":
        name = "outputs" if kind == "values" else "scores"
        return Answers(kind, {name: specs[task.output]}, classes, samples)
    return Answers(kind, dict(zip(_output_names(workload.chain), specs, strict=True)), (), samples)


def _output_names(chain: Chain) -> list[str]:
    """Return names of what a model returns: `outputs`, or those that it gives to each tensor, as far as they can name a file of answers."""
    form = chain.output_form
    if form is None or len(form.names) == 1:
        return ["outputs"]
    names: list[str] = []
    for given in form.names:
        name = given.replace("/", "_")
        name = f"output_{name}" if name.isdecimal() or name in BESIDE_OUTPUTS else name
        while name in names:
            name += "_"
        names.append(name)
    return names


class _Writer:
    """Writes answers as the place of a prediction wants them.

    Args:
        folder: Folder to write in.
        place: Place that takes what is written; None for arrays that are given back.
    """

    def __init__(self, folder: Path, place: Place | None) -> None:
        self._folder, self._place = folder, place
        self._writer: AnswerWriter | None = None
        self._names: list[str] = []

    def begin(self, answers: Answers) -> None:
        """Begin to write.

        Args:
            answers: What is to be written.
        """
        self._names = list(answers.outputs)
        with self._faults():
            self._writer = self._open(answers)

    def _open(self, answers: Answers) -> AnswerWriter:
        kind = "arrays" if self._place is None else self._place.kind
        if self._place is not None and kind == "csv":
            return TableWriter(self._folder / self._place.path.name, answers)
        inner = self._folder / ("arrays" if self._place is None or kind == "npz" else self._place.path.name)
        inner.mkdir()
        return MaskWriter(inner, answers) if kind == "masks" else ArrayWriter(inner, answers)

    def add(self, answered: tuple[list[Tensor], Tensor]) -> None:
        """Write the answers to some samples."""
        assert self._writer is not None
        outputs, targets = answered
        with self._faults():
            self._writer.add(dict(zip(self._names, outputs, strict=True)), targets)

    def closing(self) -> ExitStack:
        """Return a context at whose end all files are closed."""
        assert self._writer is not None
        stack = ExitStack()
        stack.callback(self._writer.close)
        return stack

    def finish(self) -> dict[str, Any]:
        """Write what comes last; return the arrays, where no place takes them."""
        assert self._writer is not None
        with self._faults():
            self._writer.finish()
            arrays = self._folder / "arrays"
            if self._place is None:
                return read_arrays(arrays)
            if self._place.kind == "npz":
                pack_arrays(arrays, self._folder / self._place.path.name)
        return {}

    def _faults(self) -> AbstractContextManager[None]:
        return writing_faults(self._folder if self._place is None else self._place.path)
