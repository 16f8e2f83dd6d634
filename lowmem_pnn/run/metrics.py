"""The logbook: lines of `metrics.jsonl` about steps and epochs."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from lowmem_pnn.engine.stalls import shares
from lowmem_pnn.methods import Sweep, Visit
from lowmem_pnn.run.run import Run


class EpochTimer:
    """How fast an epoch goes; made when it begins.

    Args:
        run: that it is of.
        num_done: samples of it that were done before.
    """

    samples_per_second = 0.0
    waiting: Mapping[str, float] = {}
    """What part of the time nothing was computed, by what was waited for."""

    def __init__(self, run: Run, num_done: int) -> None:
        self._began, self._num_done = time.monotonic(), num_done
        self._stalls = run.threads.stalls
        self._waited = self._stalls.seconds()

    def end(self, num_samples: int) -> None:
        """The epoch is over.

        Args:
            num_samples: of it that were done, those before included.
        """
        seconds = max(time.monotonic() - self._began, 1e-9)
        self.samples_per_second = (num_samples - self._num_done) / seconds
        self.waiting = shares(self._waited, self._stalls.seconds(), seconds)


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


def log_epoch(run: Run, item: Visit | Sweep, partition: int, micro_batch: int, pace: EpochTimer) -> None:
    """An epoch of a partition, or of a sweep; shown to people too.

    Args:
        run: whose file it goes to.
        item: the visit or sweep.
        partition: whose record tells the losses.
        micro_batch: samples on the device at once.
        pace: of the epoch, which is over.
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
        "samples_per_second": pace.samples_per_second,
        "waiting": pace.waiting,
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
