"""Metrics: what a run has taken and reached so far, by partition and in all, and the lines of `metrics.jsonl`."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lowmem_pnn.engine.stalls import Stalls, stall_shares
from lowmem_pnn.errors import BudgetError
from lowmem_pnn.methods import Sweep, Visit
from lowmem_pnn.methods.macs import epoch_macs, macs_until, program_macs
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.reporting.run_status import RunStatus
from lowmem_pnn.run.session import Session
from lowmem_pnn.run.state import State
from lowmem_pnn.run.timeline import MemoryTimeline
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import Workload

# Seconds between two points of the memory's timeline while one partition learns.
_LAP_SECONDS = 0.2


class EpochTimer:
    """How fast an epoch goes; made when the epoch begins.

    Args:
        stalls: counter of the time spent waiting.
        num_done: samples of the epoch that an earlier process has done.
    """

    samples_per_second = 0.0
    waiting: Mapping[str, float] = {}
    """Share of the time in which nothing was computed, by what was waited for."""

    def __init__(self, stalls: Stalls, num_done: int) -> None:
        self._began, self._num_done = time.monotonic(), num_done
        self._stalls = stalls
        self._waited = stalls.seconds()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done meanwhile."""
        began, waited = time.monotonic(), self._stalls.seconds()
        yield
        self._began += time.monotonic() - began
        now = self._stalls.seconds()
        self._waited = {kind: before + now[kind] - waited[kind] for kind, before in self._waited.items()}

    def end(self, num_samples: int) -> None:
        """Take the time at the epoch's end.

        Args:
            num_samples: samples of the epoch that were done, those of an earlier process included.
        """
        seconds = max(time.monotonic() - self._began, 1e-9)
        self.samples_per_second = (num_samples - self._num_done) / seconds
        self.waiting = stall_shares(self._waited, self._stalls.seconds(), seconds)


class Metrics:
    """Keeps the records of a run's state up to date, and writes `metrics.jsonl`.

    Args:
        session: the process's side of the run.
        workload: model, data and method.
        plan: partitions of the model.
        program: visits and sweeps of the run.
        state: state of the run, whose records and totals are changed.
    """

    def __init__(self, session: Session, workload: Workload, plan: Plan, program: Sequence[Visit | Sweep], state: State) -> None:
        self._session = session
        self._workload = workload
        self._plan = plan
        self._program = program
        self._state = state
        # The partition whose visit is under way, when its record was last brought up to date, and what had been waited for by then.
        self._recording: tuple[int, float, dict[str, float]] | None = None
        # Totals of earlier processes of this run; what this one adds comes on top.
        self._earlier = (state.seconds, state.bytes_read, state.bytes_written, state.peak_bytes, state.host_peak_bytes)
        self._timeline = MemoryTimeline()
        # Of the epoch in which partitions take turns, where one is under way.
        self._joint_timer: EpochTimer | None = None

    # Records of partitions.

    def begin_record(self, partition: int) -> None:
        """Count time and peak for a partition from now on, since its visit begins.

        Args:
            partition: number of the partition.
        """
        self.update_record()
        device = self._session.device
        device.set_expected_peak(self._plan.partitions[partition].predicted_peak_bytes + self._plan.waiting_bytes)
        device.begin_section()
        self._recording = partition, time.monotonic(), self._session.threads.stalls.seconds()

    def update_record(self) -> None:
        """Bring the record of the partition whose visit is under way up to now."""
        if self._recording is None:
            return
        partition, since, waited = self._recording
        record, now, stalls = self._state.records[partition], time.monotonic(), self._session.threads.stalls.seconds()
        record.seconds += now - since
        record.waited = {kind: record.waited.get(kind, 0.0) + stalls[kind] - waited[kind] for kind in stalls}
        peak = self._session.device.section_peak_bytes()
        record.peak_bytes = max(record.peak_bytes, peak)
        self._timeline.add(self._seconds(), partition, peak)
        self._recording = partition, now, stalls

    def end_record(self) -> None:
        """Bring the record up to now, and stop counting, since the visit is over."""
        self.update_record()
        self._recording = None

    def drop_record(self) -> None:
        """Stop counting without a record, since the visit did not happen."""
        self._recording = None

    # Totals of the run.

    def update_totals(self) -> None:
        """Bring times, bytes and peaks of the state up to now."""
        state, device, (_, _, _, peak, host_peak) = self._state, self._session.device, self._earlier
        totals = self.totals()
        state.seconds, state.bytes_read, state.bytes_written = totals["seconds"], totals["bytes_read"], totals["bytes_written"]
        state.peak_bytes = max(peak, device.peak_bytes)
        state.host_peak_bytes = max(host_peak, device.host_peak_bytes + self._workload.readers_peak_bytes)

    def take_over(self, seconds: float, peak_bytes: int, host_peak_bytes: int) -> None:
        """Take over what a training inside of this one took in earlier processes, which no commit of this one knows.

        Args:
            seconds: time beyond what this process has spent on it.
            peak_bytes: highest use of memory.
            host_peak_bytes: highest use of the host's memory.
        """
        before, read, written, peak, host_peak = self._earlier
        self._earlier = before + seconds, read, written, max(peak, peak_bytes), max(host_peak, host_peak_bytes)

    def totals(self) -> dict[str, Any]:
        """Return MACs, bytes and seconds so far, over all processes of the run: a part of every line of `metrics.jsonl`."""
        _, read, written, _, _ = self._earlier
        session, state, samples = self._session, self._state, len(self._workload.splits["train"])
        macs = macs_until(self._program, self._plan, samples, state.visit, state.progress.epoch, self._samples_done())
        if state.epochs_behind:
            macs += state.epochs_behind * epoch_macs(self._program[-1], self._plan, samples)
        return {
            "macs": macs,
            "bytes_read": read + session.counter.bytes_read,
            "bytes_written": written + session.counter.bytes_written,
            "seconds": self._seconds(),
        }

    def status(self) -> RunStatus:
        """Return how far the run is."""
        tally, device, totals = self._state.progress.tally, self._session.device, self.totals()
        done, epochs = self._samples_done(), 1
        if self._state.visit < len(self._program):
            epochs = max(1, self._program[self._state.visit].epochs)
        samples = len(self._workload.splits["train"])
        return RunStatus(
            num_samples=done,
            loss=tally.loss,
            used_bytes=device.used_bytes(),
            budget_bytes=device.budget_bytes,
            written_bytes=totals["bytes_written"],
            visit_share=min(1.0, (self._state.progress.epoch + done / samples) / epochs),
            run_share=totals["macs"] / max(1, program_macs(self._program, self._plan, samples)),
        )

    def _samples_done(self) -> int:
        """Return the training samples of the epoch under way that are done."""
        if self._state.visit >= len(self._program):
            return 0
        item = self._program[self._state.visit]
        batch = item.batch_size if isinstance(item, Sweep) else self._plan.partitions[item.partition].batch
        return min(len(self._workload.splits["train"]), self._state.progress.batch * batch)

    def _seconds(self) -> float:
        """Return the seconds of the run so far, over all of its processes."""
        return self._earlier[0] + time.monotonic() - self._session.began

    def after_batch(self, title: str) -> None:
        """Show where the run is, and hold the host's memory against its bound.

        Args:
            title: what learns, in words.

        Raises:
            BudgetError: the host's memory is above `--max-host-mem`.
        """
        device, limit = self._session.device, self._workload.config.max_host_mem
        if self._recording is not None and time.monotonic() - self._recording[1] > _LAP_SECONDS:
            self.update_record()
            device.begin_section()
        self._session.display.advance(self.status)
        if limit is not None and (peak := device.host_peak_bytes + self._workload.readers_peak_bytes) > limit:
            keeps = self._workload.method.sweeps and self._workload.config.host_tier
            instead = ", or --no-host-tier" if keeps else ""
            raise BudgetError(
                f"{format_bytes(peak)} of host memory were in use in {title}, above --max-host-mem {format_bytes(limit)}; "
                f"give more, or a smaller --batch-size{instead}"
            )

    # Lines of `metrics.jsonl`.

    def epoch_timer(self) -> EpochTimer:
        """Return a timer of the epoch that begins, or goes on, now."""
        return EpochTimer(self._session.threads.stalls, int(self._state.progress.tally.num_samples))

    def log_step(
        self, action: str, partition: int, epoch: int, steps_done: int, loss: float | None, rate: Callable[[int], float]
    ) -> None:
        """Log a step, if it is one of every `--log-every`.

        Args:
            action: `learn` or `sweep`.
            partition: number of the partition that learns; of a sweep that whose record tells the losses.
            epoch: finished epochs before it.
            steps_done: optimizer steps, this one included.
            loss: loss of its batch; None if the batch, or its step, was left out.
            rate: gives the learning rate of a step, counted from 0.
        """
        told = {
            "action": action,
            "partition": partition,
            "epoch": epoch + 1,
            "step": steps_done,
            "loss": loss,
            "lr": rate(steps_done - 1),
            "used_bytes": self._session.device.used_bytes(),
        }
        self._session.callbacks.tell("on_step_end", told)
        if steps_done % self._workload.config.log_every:
            return
        self._log(told)

    def log_epoch(self, action: str, partition: int, epoch: int, micro_batch: int, timer: EpochTimer) -> None:
        """Log an epoch of a partition, or of a sweep, and show it.

        Args:
            action: `learn` or `sweep`.
            partition: number of the partition whose record tells the losses.
            epoch: finished epochs, this one included.
            micro_batch: samples on the device at once.
            timer: timer of the epoch, which is over.
        """
        self.update_record()
        device = self._session.device
        line = self._log(
            {
                "action": action,
                "partition": partition,
                "epoch": epoch,
                **self._scores_of(partition),
                "samples_per_second": timer.samples_per_second,
                "waiting": timer.waiting,
                "micro_batch": micro_batch,
                "used_bytes": device.used_bytes(),
                "peak_bytes": self._state.records[partition].peak_bytes if action == "learn" else device.peak_bytes,
                "memory": self._timeline.take(),
            }
        )
        self._session.display.end_epoch(line)
        self._session.callbacks.tell("on_epoch_end", line)

    def log_validation(self, partition: int, epoch: int, steps_done: int) -> None:
        """Log a validation within an epoch, and show it.

        Args:
            partition: number of the partition whose record tells the scores.
            epoch: finished epochs before it.
            steps_done: optimizer steps by now.
        """
        scores = {name: value for name, value in self._scores_of(partition).items() if name != "train_loss"}
        self._log({"action": "validate", "partition": partition, "epoch": epoch + 1, "step": steps_done, **scores})
        told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if value is not None)
        if told:  # of a loss that is no finite number something else is said
            self._session.display.message(f"step {steps_done}: {told}")

    def time_macro_batch(self, visit: Visit) -> None:
        """Time the epoch in which partitions take turns, from its first visit on, or from the first one of this process.

        Args:
            visit: a visit of a macro-batch, which begins.
        """
        begins = visit.begins_epoch and visit.partition == 0 and visit.action == "learn"
        if visit.macro_batch is not None and (begins or self._joint_timer is None):
            self._joint_timer = EpochTimer(self._session.threads.stalls, visit.macro_batch[0])

    def end_joint_epoch(self, num_samples: int) -> EpochTimer:
        """Return the timer of an epoch in which all partitions took turns, which is over.

        Args:
            num_samples: samples of the epoch.
        """
        assert self._joint_timer is not None, "its visits are timed"
        timer, self._joint_timer = self._joint_timer, None
        timer.end(num_samples)
        return timer

    def log_joint_epoch(self, epoch: int, timer: EpochTimer) -> None:
        """Log an epoch in which all partitions took turns, a line for each, and show the last one, which has the epoch's rate and memory.

        Args:
            epoch: finished epochs, this one included.
            timer: timer of the epoch, which is over.
        """
        line: dict[str, Any] = {}
        for number, record in enumerate(self._state.records):
            line = {
                "action": "learn",
                "partition": number,
                "epoch": epoch,
                **self._scores_of(number),
                "micro_batch": self._state.micro_batches[number],
                "used_bytes": self._session.device.used_bytes(),
                "peak_bytes": record.peak_bytes,
            }
            if number == len(self._state.records) - 1:
                line |= {
                    "samples_per_second": timer.samples_per_second,
                    "waiting": timer.waiting,
                    "memory": self._timeline.take(),
                }
            line = self._log(line)
            self._session.callbacks.tell("on_epoch_end", line)
        self._session.display.end_epoch(line)

    def log_emit(self, visit: Visit) -> None:
        """Log that a partition's outputs were written.

        Args:
            visit: the visit that wrote them.
        """
        self._log({"action": visit.action, "partition": visit.partition, "split": visit.split})

    def _scores_of(self, partition: int) -> dict[str, float | None]:
        record = self._state.records[partition]
        more = {f"val_{name}": value for name, value in record.val_scores.items()}
        return {"train_loss": record.train_loss, "val_loss": record.val_loss, "val_accuracy": record.val_accuracy, **more}

    def _log(self, line: dict[str, Any]) -> dict[str, Any]:
        """Write a line, with the visit before it and the totals after it, and return it."""
        whole = {"visit": self._state.visit, **line, **self.totals()}
        self._session.rundir.log(whole)
        return whole
