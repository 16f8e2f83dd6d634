"""The logbook: lines of `metrics.jsonl` about steps and epochs."""

from collections.abc import Callable
from typing import Any

from lowmem_pnn.methods import Sweep, Visit
from lowmem_pnn.run import Run


def log_step(run: Run, action: str, epoch: int, steps_done: int, loss: float | None, rate: Callable[[int], float]) -> None:
    """A step, where it is one to be logged.

    Args:
        run: whose file it goes to.
        action: `learn` or `sweep`.
        epoch: finished ones before it.
        steps_done: optimizer steps, this one included.
        loss: of its batch; None if that was left out.
        rate: gives the learning rate of a step, counted from 0.
    """
    if steps_done % run.workload.config.log_every:
        return
    line: dict[str, Any] = {
        "visit": run.state.visit,
        "action": action,
        "epoch": epoch + 1,
        "step": steps_done,
        "loss": loss,
        "lr": rate(steps_done - 1),
        **run.totals(),
    }
    run.rundir.log(line)


def log_epoch(run: Run, item: Visit | Sweep, partition: int, micro_batch: int, speed: float) -> None:
    """An epoch of a partition, or of a sweep; shown to people too.

    Args:
        run: whose file it goes to.
        item: the visit or sweep.
        partition: whose record tells the losses.
        micro_batch: samples on the device at once.
        speed: samples a second.
    """
    record, device = run.state.records[partition], run.device
    line: dict[str, Any] = {
        "visit": run.state.visit,
        "action": item.action if isinstance(item, Visit) else "sweep",
        "partition": partition,
        "epoch": run.state.progress.epoch,
        "train_loss": record.train_loss,
        "val_loss": record.val_loss,
        "val_accuracy": record.val_accuracy,
        "samples_per_second": speed,
        "micro_batch": micro_batch,
        "used_bytes": device.used_bytes(),
        "peak_bytes": device.section_peak_bytes() if isinstance(item, Visit) else device.peak_bytes,
        **run.totals(),
    }
    run.rundir.log(line)
    run.display.end_epoch(line)


def log_joint_epoch(run: Run, epoch: int) -> None:
    """An epoch of all partitions in turns, a line for each.

    Args:
        run: whose file it goes to.
        epoch: finished ones, this one included.
    """
    for number, record in enumerate(run.state.records):
        line = {
            "visit": run.state.visit,
            "action": "learn",
            "partition": number,
            "epoch": epoch,
            "train_loss": record.train_loss,
            "val_loss": record.val_loss,
            "val_accuracy": record.val_accuracy,
            **run.totals(),
        }
        run.rundir.log(line)
