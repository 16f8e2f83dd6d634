"""The result of a run: what `result.json` says."""

import importlib.metadata
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem_pnn.config.defaults import training_facts
from lowmem_pnn.evaluation.exits import chosen_exit
from lowmem_pnn.exporting.transformers_folder import holds_a_model
from lowmem_pnn.methods.macs import epoch_macs, macs_until, program_macs, samples_learnt
from lowmem_pnn.planning.batch_norm import batch_norm_use, mixing_note
from lowmem_pnn.planning.describe import ahead_bytes, describe_partition
from lowmem_pnn.planning.notes import (
    adapter_notes,
    augmentation_notes,
    device_notes,
    fixed_notes,
    frozen_notes,
    micro_batch_notes,
    mixing_notes,
    pattern_notes,
    precision_notes,
    vocabulary_notes,
)
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.profiling.costs import MemoryProfile
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.run import Run
from lowmem_pnn.sources.dataset import TASK_OF
from lowmem_pnn.stores.run_creation import TRANSFORMERS_FOLDER
from lowmem_pnn.workload.data_form import DataForm
from lowmem_pnn.workload.data_notes import data_notes
from lowmem_pnn.workload.model_notes import model_notes
from lowmem_pnn.workload.plain_training import plain_bytes

_PACKAGES = ("lowmem-pnn", "torch", "torchvision", "safetensors", "numpy")


def make_result(
    run: Run,
    profile: MemoryProfile,
    scores: dict[str, dict[str, Any]],
    exits: list[dict[str, Any]],
    adapter: Path | None,
    said: Sequence[str],
) -> Result:
    """Return what a run has come to.

    Args:
        run: a trained run.
        profile: costs of the model's layers.
        scores: scores by part of the data, `val` and `test`.
        exits: early exits, as `describe_exits` gives them.
        adapter: folder of what has been learnt beside a frozen base; None where there is none.
        said: what the model says now after each prompt of `--sample`.
    """
    workload, plan, state, device = run.workload, run.plan, run.state, run.session.device
    config, last, path = workload.config, state.records[-1], run.session.rundir.path
    test, (samples_learnt_from, macs) = scores.get("test", {}), _learnt(run)
    return Result(
        method=config.method,
        model=config.model,
        data=config.data,
        val_data=config.val_data,
        test_data=config.test_data,
        seed=config.seed,
        precision=config.precision,
        device=device.describe(),
        budget_bytes=device.budget_bytes,
        budget_scope=config.budget_scope,
        context=device.context,
        floor_bytes=device.floor_bytes,
        peak_bytes=max(state.peak_bytes, *(record.peak_bytes for record in state.records)),  # of any process
        host_peak_bytes=state.host_peak_bytes,
        predicted_peak_bytes=plan.predicted_peak_bytes,
        reserve_bytes=device.reserve_bytes,
        plain_bytes=plain_bytes(workload, profile, max(part.batch for part in plan.partitions)),
        check=state.check,
        compared=state.compared,
        batch_norm=use.to_dict() if (use := batch_norm_use(workload, plan, state.micro_batches, state.sweep_micro_batch)) else {},
        module_state=state.module_state,
        weights=state.pretrained,
        meta=state.meta,
        notes=_notes(run),
        training_state_bytes=profile.training_state_bytes,
        partitions=_partitions(run, PlanRequest(workload, profile, device)),
        epochs=[config.value_for("epochs", number) for number in range(len(plan.partitions))],
        training=training_facts(config),
        **_end_and_best(run),
        seconds=state.seconds,
        compiled=workload.compiled,
        samples_per_second=samples_learnt_from / max(state.seconds, 1e-9),
        train_loss=last.train_loss,
        val_loss=last.val_loss,
        val_accuracy=last.val_accuracy,
        task=TASK_OF[workload.dataset.targets.kind],
        loss=config.loss,
        scores=scores,
        test_loss=test.get("loss"),
        test_accuracy=test.get("accuracy"),
        test_f1=test.get("f1"),
        perplexity=test.get("perplexity"),
        macs=macs,
        exits=exits,
        chosen_exit=chosen_exit(exits, config.exit_tolerance, by_loss=workload.dataset.targets.kind == "labels"),
        bytes_read=state.bytes_read,
        bytes_written=state.bytes_written,
        drive_tbw=config.drive_tbw,
        oom_retries=state.oom_retries,
        skipped_steps=sum(scale.skipped for scale in state.loss_scales),
        skipped_samples=workload.dataset.skipped_samples,
        resumed=state.resumed,
        workdir=str(path),
        weights_file=str(path / "model.safetensors"),
        transformers_folder=str(path / TRANSFORMERS_FOLDER) if holds_a_model(workload) else None,
        adapter=None if adapter is None else str(adapter),
        samples=[
            {"prompt": prompt, "before": before, "after": after}
            for prompt, before, after in zip(config.sample or (), state.said_before, said, strict=False)
        ],
        preprocessing=workload.dataset.preprocessing,
        data_parts=workload.dataset.parts,
        preparation=workload.dataset.preparation,
        form=DataForm.of(workload.dataset, workload.task.class_weights).to_dict(),
        workers=config.workers,
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
    )


def _notes(run: Run) -> list[str]:
    """Return what is to be known of a run, a line each."""
    workload, plan, state = run.workload, run.plan, run.state
    mixed = mixing_note(workload, plan, state.mixing, state.micro_batches, state.sweep_micro_batch)
    return [
        *workload.source.notes,
        *adapter_notes(workload),
        *data_notes(workload),
        *frozen_notes(workload),
        *fixed_notes(workload, plan),
        *vocabulary_notes(workload, plan),
        *pattern_notes(workload, plan),
        *augmentation_notes(workload, plan),
        *mixing_notes(workload),
        *([mixed] if mixed is not None else []),
        *micro_batch_notes(workload, plan),
        *model_notes(workload),
        *precision_notes(workload.config),
        *device_notes(run.session.device),
        *state.changes,
    ]


def _end_and_best(run: Run) -> dict[str, Any]:
    """Return where training ended early, and whose weights are kept: epochs where they are whole, and steps."""
    steps, best, per_epoch = run.state.stopped_step, run.state.best, _steps_per_epoch(run)
    return {
        "stopped_after": run.state.stopped_after if steps and not steps % per_epoch else None,
        "stopped_step": steps or None,
        "best_epoch": best.epoch if best.step and not best.step % per_epoch else None,
        "best_step": best.step or None,
        "weights_of": run.workload.config.keep_weights if best.weights else "last",
    }


def _learnt(run: Run) -> tuple[int, int]:
    """Return the samples that were learnt from, and the multiply-accumulates of it: of all processes, where several train a partition each."""
    workload, plan, steps, stopped = run.workload, run.plan, run.state.stopped_step, run.state.stopped_after
    program, samples = workload.program(plan.spans), len(workload.splits["train"])
    last = program[-1]
    if not steps:
        missing = workload.samples_not_reached
        macs = program_macs(program, plan, samples) - epoch_macs(last, plan, missing)
        return samples_learnt(program, samples) - missing, macs
    # Of the epoch in which training ended, if it ended within one.
    rest = min(samples, (steps - stopped * _steps_per_epoch(run)) * plan.partitions[-1].batch)
    # What was learnt before the visit, or the sweeps, that ended early.
    earlier = samples_learnt(program[:-1], samples) - samples * last.epochs_before
    macs = macs_until(program, plan, samples, len(program) - 1, stopped - last.epochs_before, rest)
    return earlier + samples * stopped + rest, macs


def _steps_per_epoch(run: Run) -> int:
    return math.ceil(len(run.workload.splits["train"]) / run.plan.partitions[-1].batch)


def _partitions(run: Run, request: PlanRequest) -> list[dict[str, Any]]:
    """Return what is said of each partition: its plan, and what it took."""
    workload, state = run.workload, run.state
    return [
        {
            **describe_partition(workload, part),
            "ahead_bytes": ahead_bytes(request, run.plan, part),
            "micro_batch": state.sweep_micro_batch if workload.method.sweeps else state.micro_batches[number],
            "epochs": workload.config.value_for("epochs", number),
            "peak_bytes": record.peak_bytes,
            "seconds": record.seconds,
            "waited": record.waited,
        }
        for number, (part, record) in enumerate(zip(run.plan.partitions, state.records, strict=True))
    ]
