"""A run: goes through a method's visits, from commit to commit, and can be picked up at any of them."""

import math
import shlex
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowmem_pnn.device import Device
from lowmem_pnn.errors import BudgetError, DiskError, DivergedError, Stopped
from lowmem_pnn.executor import Executor, Progress, Stage, Tally
from lowmem_pnn.feeds import DatasetFeed, Feed, ShardFeed
from lowmem_pnn.methods import Visit
from lowmem_pnn.methods.base import Split
from lowmem_pnn.planner import Plan
from lowmem_pnn.progress import Display
from lowmem_pnn.residency import Residency
from lowmem_pnn.stores import disk
from lowmem_pnn.stores.activations import ActivationStore, ActivationWriter
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.rundir import RunDir
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import IoSizes, Workload


class Threads:
    """The run's background threads, one for each direction; started before the floor is taken, since their stacks count."""

    def __init__(self) -> None:
        self.read = ThreadPoolExecutor(1, "lowmem-read")
        self.write = ThreadPoolExecutor(1, "lowmem-write")
        self.commit = ThreadPoolExecutor(1, "lowmem-commit")
        for pool in (self.read, self.write, self.commit):
            pool.submit(int).result()

    def close(self) -> None:
        """Wait for what is under way, and end the threads."""
        for pool in (self.read, self.write, self.commit):
            pool.shutdown()


@dataclass
class PartitionRecord:
    """What is known of a partition once it was trained.

    Args:
        seconds: in its visits.
        peak_bytes: the most that was in use during them, above the floor.
        train_loss: mean over its last epoch.
        val_loss: after its last epoch.
        val_accuracy: likewise, for the last partition.
    """

    seconds: float = 0.0
    peak_bytes: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    val_accuracy: float | None = None


@dataclass
class State:
    """What the journal holds: where the run is, and what belongs to that place."""

    plan: dict[str, Any]
    micro_batches: list[int]
    data: str = ""
    number: int = 0
    stage: str = "born"
    visit: int = 0
    progress: Progress = field(default_factory=Progress)
    weights: dict[str, Any] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)
    records: list[PartitionRecord] = field(default_factory=list)
    check: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    peak_bytes: int = 0
    host_peak_bytes: int = 0
    oom_retries: int = 0
    resumed: int = 0
    metrics_bytes: int = 0

    @classmethod
    def from_journal(cls, body: dict[str, Any]) -> "State":
        """Read what `to_journal` gave."""
        progress = dict(body["progress"])
        progress["tally"] = Tally(**progress["tally"])
        return cls(
            **{**body, "progress": Progress(**progress), "records": [PartitionRecord(**record) for record in body["records"]]}
        )

    def to_journal(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return asdict(self)


class Run:
    """A run in its directory.

    Args:
        workload: what is trained.
        plan: how it is cut.
        device: open.
        rundir: locked by this process.
        weights: the run's, at the state of the last commit.
        state: of the last commit.
        threads: for reading ahead and writing behind.
        counter: counts every byte read and written.
        display: told what happens.
        should_stop: asked after every batch; when it says so the run commits and raises `Stopped`.
    """

    def __init__(
        self,
        workload: Workload,
        plan: Plan,
        device: Device,
        rundir: RunDir,
        weights: WeightStore,
        state: State,
        threads: Threads,
        counter: IoCounter,
        display: Display,
        should_stop: Callable[[], bool] = lambda: False,
        began: float | None = None,
    ) -> None:
        self._workload = workload
        self._plan = plan
        self._device = device
        self._rundir = rundir
        self.weights = weights
        self.state = state
        self._threads = threads
        self._counter = counter
        self._display = display
        self._should_stop = should_stop
        self._io = IoSizes.of_budget(workload.config.max_gpu_mem)
        self._executor = Executor(device, workload.config.seed, self._note_shrink)
        self._pending: Future[None] | None = None
        self._once_named = {
            folder for body in (state.to_journal(), *rundir.older_journals()) for folder in body["activations"].values()
        }
        # The record of the partition whose visit is under way, and since when it has been brought up to date.
        self._record: tuple[PartitionRecord, float] | None = None
        # Totals of earlier processes of this run; what this one adds comes on top.
        self._earlier = (state.seconds, state.bytes_read, state.bytes_written, state.peak_bytes, state.host_peak_bytes)
        self._last_commit = time.monotonic()
        self._began = self._last_commit if began is None else began

    @property
    def _activations(self) -> Path:
        return self._rundir.path / "activations"

    def train(self) -> None:
        """Go through the visits that are left.

        Raises:
            Stopped: it was asked to stop; everything up to then is committed.
        """
        visits = self._workload.method.visits(len(self._plan.partitions), self._workload.training_splits)
        stage: Stage | None = None
        while self.state.visit < len(visits):
            visit = visits[self.state.visit]
            if stage is not None and stage.number != visit.partition:
                self._leave(stage)
                stage = None
            if stage is None:
                stage = self._enter(visit.partition, learns=visit.action == "learn")
            self._record = self.state.records[visit.partition], time.monotonic()
            if visit.action == "learn":
                self._learn(visit, stage)
            else:
                self._emit(visit, stage)
            self._update_record()
            self.state.visit += 1
            self.state.progress = Progress()
            self.commit(stage if visit.action == "learn" else None)
            if self.state.visit < len(visits):
                self._stop_if_asked()
        if stage is not None:
            self._leave(stage)
        self.wait()

    def measure(self, visits: list[Visit], consume: Callable[[Any, Any], None]) -> None:
        """Send samples through all partitions, one after the other, and give the outputs to `consume`.

        Args:
            visits: `emit`, one for each partition in order.
            consume: takes micro-batches of outputs, on the device, and labels, on the host.
        """
        folders: list[Path] = []
        for visit in visits:
            stage = self._enter(visit.partition, learns=False)
            with ExitStack() as stack:
                feed = self._feed(stack, visit.partition, visit.split, folders[-1] if folders else None)
                if stage.is_last:
                    self._executor.forward(stage, feed, lambda *batch: batch, lambda batch: consume(*batch))
                else:
                    folders.append(self._activations / f"b{visit.partition + 1:02d}-{visit.split}-measured")
                    self._write(stage, feed, folders[-1])
            self._leave(stage)
            for folder in folders[:-1] if not stage.is_last else folders:
                shutil.rmtree(folder, ignore_errors=True)

    def stage(self, partition: int, *, learns: bool) -> Stage:
        """A partition on the device, ready to work; the caller unloads its residency."""
        return self._enter(partition, learns=learns)

    def commit(self, changed: Stage | None = None) -> None:
        """Make the present state the one to resume from. Syncing and hashing go on in the background.

        Args:
            changed: the partition whose weights moved since the last commit, if any.
        """
        self.wait()
        self._update_record()
        if changed is not None:
            _check_finite(changed)
            with self.weights.writer(changed.number) as writer:
                changed.residency.save(writer)
        self.update_totals()
        self.state.number += 1
        self.state.metrics_bytes = self._rundir.metrics_bytes()
        journal = self.state.to_journal()
        self._pending = self._threads.commit.submit(self._finish_commit, journal, None if changed is None else changed.number)
        self._last_commit = time.monotonic()

    def _update_record(self) -> None:
        if self._record is not None:
            record, since = self._record
            now = time.monotonic()
            record.seconds += now - since
            record.peak_bytes = max(record.peak_bytes, self._device.section_peak_bytes())
            self._record = record, now

    def wait(self) -> None:
        """Wait until the last commit is durable."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def update_totals(self) -> None:
        """Bring times, bytes and peaks of the state up to now."""
        state, (seconds, read, written, peak, host_peak) = self.state, self._earlier
        state.seconds = seconds + time.monotonic() - self._began
        state.bytes_read = read + self._counter.bytes_read
        state.bytes_written = written + self._counter.bytes_written
        state.peak_bytes = max(peak, self._device.peak_bytes)
        state.host_peak_bytes = max(host_peak, self._device.host_peak_bytes)

    def _finish_commit(self, journal: dict[str, Any], changed: int | None) -> None:
        if changed is not None:
            journal["weights"] = self.state.weights = self.weights.seal([changed])
        kept = self._rundir.commit(journal, self._workload.config.keep_commits)
        # Deleted only now that no journal names it.
        self.weights.discard_obsolete([body["weights"] for body in kept if body["weights"]])
        named = {folder for body in kept for folder in body["activations"].values()}
        # Only what a commit has named: other stores are being written for the next one meanwhile.
        for folder in self._once_named - named:
            shutil.rmtree(self._activations / folder, ignore_errors=True)
        self._once_named = named
        disk.commit_point("discarded")
        limit = self._workload.config.max_disk
        if limit is not None and journal["stage"] != "done" and (found := self._rundir.disk_bytes()) > limit:
            raise DiskError(f"the run takes {format_bytes(found)} on disk, above --max-disk {format_bytes(limit)}; give more")

    def _learn(self, visit: Visit, stage: Stage) -> None:
        progress, record = self.state.progress, self.state.records[visit.partition]
        if stage.residency.optimizer is None:
            self._display.message(f"{stage.title} has only frozen weights: nothing to learn")
            return
        with ExitStack() as stack:
            feed = self._feed(stack, visit.partition, "train", self._folder("train"))
            val = None
            if "val" in self._workload.splits:
                val = self._feed(stack, visit.partition, "val", self._folder("val"))
            while progress.epoch < visit.epochs:
                began, done = time.monotonic(), progress.tally.num_samples
                self._display.start_epoch(stage.title, progress.epoch, visit.epochs, feed.num_samples, done)
                self._executor.learn_epoch(stage, feed, progress, lambda: self._after_batch(stage, feed))
                tally, progress.tally = progress.tally, Tally()
                seconds = time.monotonic() - began
                measured = self._executor.measure(stage, val) if val is not None else None
                record.train_loss = tally.loss
                if measured is not None:
                    if not math.isfinite(measured.loss):
                        raise DivergedError(
                            f"the validation loss became {measured.loss} in {stage.title}, epoch {progress.epoch}; "
                            "the last commit is kept; try a lower --lr"
                        )
                    record.val_loss, record.val_accuracy = measured.loss, measured.accuracy
                line = {
                    "visit": self.state.visit,
                    "action": "learn",
                    "partition": visit.partition,
                    "epoch": progress.epoch,
                    "train_loss": tally.loss,
                    "val_loss": record.val_loss,
                    "val_accuracy": record.val_accuracy,
                    "samples_per_second": (tally.num_samples - done) / max(seconds, 1e-9),
                    "micro_batch": stage.micro_batch,
                    "used_bytes": self._device.used_bytes(),
                    "peak_bytes": self._device.section_peak_bytes(),
                    "bytes_read": self._earlier[1] + self._counter.bytes_read,
                    "bytes_written": self._earlier[2] + self._counter.bytes_written,
                    "seconds": self._earlier[0] + time.monotonic() - self._began,
                }
                self._rundir.log(line)
                self._display.end_epoch(line)
                if progress.epoch < visit.epochs:
                    self._maybe_commit(stage)

    def _after_batch(self, stage: Stage, feed: Feed) -> None:
        self._display.advance(self.state.progress.tally.num_samples, self._device.used_bytes(), self._device.budget_bytes)
        limit = self._workload.config.max_host_mem
        if limit is not None and (found := self._device.host_peak_bytes) > limit:
            raise BudgetError(
                f"{format_bytes(found)} of host memory were in use in {stage.title}, above --max-host-mem {format_bytes(limit)}; "
                "give more, or a smaller --batch-size"
            )
        # At an epoch's last batch the commit is the epoch's own: then position and measurements belong together.
        if self.state.progress.batch * stage.batch_size < feed.num_samples:
            self._maybe_commit(stage)

    def _maybe_commit(self, stage: Stage) -> None:
        if self._should_stop():
            self.commit(stage)
            self._stop_if_asked()
        if time.monotonic() - self._last_commit >= self._workload.config.commit_every:
            self.commit(stage)

    def _stop_if_asked(self) -> None:
        if self._should_stop():
            self.wait()
            folder = shlex.quote(str(self._rundir.path))
            raise Stopped(f"stopped; lowmem-pnn fit --resume --workdir {folder} goes on from the last commit")

    def _emit(self, visit: Visit, stage: Stage) -> None:
        folder = self._activations / f"b{visit.partition + 1:02d}-{visit.split}"
        with ExitStack() as stack:
            feed = self._feed(stack, visit.partition, visit.split, self._folder(visit.split))
            self._display.start_emit(stage.title, visit.split, feed.num_samples)
            self._write(stage, feed, folder)
        self.state.activations[visit.split] = folder.name

    def _write(self, stage: Stage, feed: Feed, folder: Path) -> None:
        if folder.exists():
            shutil.rmtree(folder)  # what an earlier process wrote and never committed
        folder.parent.mkdir(exist_ok=True)
        specs = self._workload.chain.boundaries[self._plan.partitions[stage.number].stop]
        with ActivationWriter(
            folder, specs, feed.num_samples, self._io.shard_bytes, self._threads.write, self._counter
        ) as writer:
            self._executor.emit(stage, feed, writer, self._stop_if_asked)

    def _folder(self, split: Split) -> Path | None:
        name = self.state.activations.get(split)
        return None if name is None else self._activations / name

    def _feed(self, stack: ExitStack, partition: int, split: Split, folder: Path | None) -> Feed:
        seed, pool = self._workload.config.seed, self._threads.read
        feed: Feed
        if partition == 0:
            feed = DatasetFeed(self._workload.splits[split], seed, pool, mix=split == "train")
        else:
            assert folder is not None, "the partition before has written its outputs"
            # Training samples may stay in memory from epoch to epoch while the validation set passes through.
            window = self._io.window_bytes if split == "train" else self._io.window_bytes // 2
            feed = ShardFeed(ActivationStore.open(folder, counter=self._counter), seed, pool, window)
        stack.callback(feed.close)
        return feed

    def _enter(self, partition: int, *, learns: bool) -> Stage:
        self._device.begin_section()
        planned, chain = self._plan.partitions[partition], self._workload.chain
        last = chain.layers[planned.stop - 1].name
        title = f"partition {partition + 1} of {len(self._plan.partitions)} ({chain.layers[planned.start].name} to {last})"
        self._display.enter(title)
        residency = Residency(
            chain, planned.start, planned.stop, self._device, self._workload.optimizer(partition) if learns else None
        )
        with self.weights.reader(partition) as reader:
            residency.load(reader, self._threads.read)
        stage = Stage(
            number=partition,
            title=title,
            residency=residency,
            objective=self._workload.objective(self._plan, partition),
            batch_size=planned.batch,
            micro_batch=self.state.micro_batches[partition],
            smallest_micro_batch=self._plan.smallest_micro_batch,
            is_last=partition == len(self._plan.partitions) - 1,
        )
        try:
            self._executor.prepare(stage)
        except BaseException:
            residency.unload()
            raise
        return stage

    def _leave(self, stage: Stage) -> None:
        stage.residency.unload()

    def _note_shrink(self, stage: Stage) -> None:
        self._update_record()
        self.state.micro_batches[stage.number] = stage.micro_batch
        self.state.oom_retries += 1
        self._display.message(f"{stage.title}: out of memory; going on with a micro-batch of {stage.micro_batch}")


def _check_finite(stage: Stage) -> None:
    """A commit must be one that training can go on from: an infinite gradient shows only in the weights."""
    for name, parameter in stage.residency.trainable.items():
        if not math.isfinite(float(parameter.detach().sum())):
            raise DivergedError(
                f"weight {name!r} is no longer finite in {stage.title}; the last commit is kept; try a lower --lr"
            )
