"""A run: a workload in its directory, with everything that training it needs at hand, and commits that it can be resumed from."""

import gc
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from lowmem_pnn.device import Device
from lowmem_pnn.device.buffers import BufferSizes
from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.executor import Executor
from lowmem_pnn.engine.loaders import DatasetLoader, Loader, ShardLoader, SyntheticLabelLoader
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.errors import BudgetError, ConfigError, DiskError, DivergedError, Stopped
from lowmem_pnn.methods import Sweep, SyntheticLabels, share_of
from lowmem_pnn.methods.base import SplitName
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.run.macs import macs_until
from lowmem_pnn.run.state import State
from lowmem_pnn.stores import disk
from lowmem_pnn.stores.activations import ActivationStore, ActivationWriter
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.encoding import KeptAs, OverflowFault
from lowmem_pnn.stores.run_directory import RunDirectory
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import Workload

Save = Callable[[], Sequence[int]]
"""Brings the present weights into working files, and says which partitions' files changed since the last commit."""


def nothing_changed() -> Sequence[int]:
    """No weights moved."""
    return ()


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
        began: when the process did, on the monotonic clock.
    """

    def __init__(
        self,
        workload: Workload,
        plan: Plan,
        device: Device,
        rundir: RunDirectory,
        weights: WeightStore,
        state: State,
        threads: WorkerThreads,
        counter: IoCounter,
        display: Display,
        should_stop: Callable[[], bool] = lambda: False,
        began: float | None = None,
    ) -> None:
        self.workload = workload
        self.plan = plan
        self.device = device
        self.rundir = rundir
        self.weights = weights
        self.state = state
        self.threads = threads
        self.counter = counter
        self.display = display
        program = workload.method.program(len(plan.partitions), workload.training_splits)
        self.program = share_of(program, state.rank, state.ranks)
        self.executor = Executor(device, workload.config.seed, self._note_shrink, threads.stalls)
        self._should_stop = should_stop
        self._io = BufferSizes.of_budget(workload.config.max_gpu_mem)
        self._pending: Future[None] | None = None
        self._once_named = {
            folder for body in (state.to_journal(), *rundir.older_journals()) for folder in body["activations"].values()
        }
        # Stores that some commit has named, which only the end of that commit may delete; and partitions kept since the last one.
        self._promised = set(self._once_named)
        self._kept: set[int] = set()
        # The partition whose visit is under way, when its record was last brought up to date, and what had been waited for by then.
        self._recording: tuple[int, float, dict[str, float]] | None = None
        # Totals of earlier processes of this run; what this one adds comes on top.
        self._earlier = (state.seconds, state.bytes_read, state.bytes_written, state.peak_bytes, state.host_peak_bytes)
        self._last_commit = time.monotonic()
        self._began = self._last_commit if began is None else began

    # Commits.

    def commit(self, save: Save = nothing_changed) -> None:
        """Make the present state the one to resume from. Syncing and hashing go on in the background.

        Args:
            save: brings weights that moved since the last commit into working files.
        """
        self.wait()
        self.update_record()
        changed = sorted({*save(), *self._kept})
        self._kept.clear()
        self.weights.freeze(changed)
        self.update_totals()
        self.state.number += 1
        self.state.metrics_bytes = self.rundir.metrics_bytes()
        journal = self.state.to_journal()
        self._promised.update(journal["activations"].values())
        self._pending = self.threads.commit.submit(self._finish_commit, journal, changed)
        self._last_commit = time.monotonic()

    def keep(self, save: Save) -> None:
        """Bring weights into working files now, for the next commit to take them up.

        Args:
            save: what brings them there.
        """
        self._kept.update(save())

    def drop_store(self, name: str) -> None:
        """Delete a store of activations that no commit names; one that a commit names goes when that does.

        Args:
            name: of its folder.
        """
        if name not in self._promised:
            shutil.rmtree(self.activations / name, ignore_errors=True)

    def maybe_commit(self, save: Save) -> None:
        """Commit if it is time to, or if the run is to stop.

        Raises:
            Stopped: it was asked to; everything up to now is committed.
        """
        if self._should_stop():
            self.commit(save)
            self.stop_if_asked()
        if time.monotonic() - self._last_commit >= self.workload.config.commit_every:
            self.commit(save)

    def stop_if_asked(self) -> None:
        """End the run if it was asked to.

        Raises:
            Stopped: it was.
        """
        if self._should_stop():
            self.wait()
            folder = shlex.quote(str(self.rundir.path))
            raise Stopped(f"stopped; lowmem-pnn fit --resume --workdir {folder} goes on from the last commit")

    def wait(self) -> None:
        """Wait until the last commit is durable."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def go_back(self) -> None:
        """Return to the last commit: what was trained since then did not happen. Nothing may be resident."""
        self.wait()
        self.weights.rollback()
        self._kept.clear()
        commit = State.from_journal(self.rundir.journal())
        self.state.go_back_to(commit)
        self.rundir.cut_metrics(commit.metrics_bytes)
        self._recording = None

    def _finish_commit(self, journal: dict[str, Any], changed: Sequence[int]) -> None:
        if changed:
            journal["weights"] = self.state.weights = self.weights.seal(changed)
        kept = self.rundir.commit(journal, self.workload.config.keep_commits)
        # Deleted only now that no journal names it.
        self.weights.discard_obsolete([body["weights"] for body in kept if body["weights"]])
        named = {folder for body in kept for folder in body["activations"].values()}
        # Only what a commit has named: other stores are being written for the next one meanwhile.
        for folder in self._once_named - named:
            shutil.rmtree(self.activations / folder, ignore_errors=True)
        self._once_named = named
        disk.commit_point("discarded")
        limit = self.workload.config.max_disk
        if limit is not None and journal["stage"] != "done" and (found := self.rundir.disk_bytes()) > limit:
            raise DiskError(f"the run takes {format_bytes(found)} on disk, above --max-disk {format_bytes(limit)}; give more")

    # Totals and records.

    def begin_record(self, partition: int) -> None:
        """A visit of a partition begins: its time and its peak are the partition's from now on."""
        self.update_record()
        self.device.expect(self.plan.partitions[partition].predicted_peak_bytes)
        self.device.begin_section()
        self._recording = partition, time.monotonic(), self.threads.stalls.seconds()

    def update_record(self) -> None:
        """Bring the record of the present visit up to now."""
        if self._recording is not None:
            partition, since, waited = self._recording
            record, now, stalls = self.state.records[partition], time.monotonic(), self.threads.stalls.seconds()
            record.seconds += now - since
            record.waited = {kind: record.waited.get(kind, 0.0) + stalls[kind] - waited[kind] for kind in stalls}
            record.peak_bytes = max(record.peak_bytes, self.device.section_peak_bytes())
            self._recording = partition, now, stalls

    def end_record(self) -> None:
        """The visit is over."""
        self.update_record()
        self._recording = None

    def update_totals(self) -> None:
        """Bring times, bytes and peaks of the state up to now."""
        state, (_, _, _, peak, host_peak) = self.state, self._earlier
        totals = self.totals()
        state.seconds, state.bytes_read, state.bytes_written = totals["seconds"], totals["bytes_read"], totals["bytes_written"]
        state.peak_bytes = max(peak, self.device.peak_bytes)
        state.host_peak_bytes = max(host_peak, self.device.host_peak_bytes)

    def totals(self) -> dict[str, Any]:
        """Computation, bytes and seconds so far, over all processes of the run: for `metrics.jsonl`."""
        seconds, read, written, _, _ = self._earlier
        state, samples = self.state, len(self.workload.splits["train"])
        done = 0
        if state.visit < len(self.program):
            item = self.program[state.visit]
            batch = item.batch_size if isinstance(item, Sweep) else self.plan.partitions[item.partition].batch
            done = min(samples, state.progress.batch * batch)
        return {
            "macs": macs_until(self.program, self.plan, samples, state.visit, state.progress.epoch, done),
            "bytes_read": read + self.counter.bytes_read,
            "bytes_written": written + self.counter.bytes_written,
            "seconds": seconds + time.monotonic() - self._began,
        }

    def after_batch(self, title: str) -> None:
        """Show where the run is, and see to the host's memory.

        Raises:
            BudgetError: the host's memory is above its bound.
        """
        self.display.advance(self.state.progress.tally.num_samples, self.device.used_bytes(), self.device.budget_bytes)
        limit = self.workload.config.max_host_mem
        if limit is not None and (found := self.device.host_peak_bytes) > limit:
            raise BudgetError(
                f"{format_bytes(found)} of host memory were in use in {title}, above --max-host-mem {format_bytes(limit)}; "
                "give more, or a smaller --batch-size"
            )

    # Stages and their samples.

    @property
    def activations(self) -> Path:
        """Where stores of boundary activations are."""
        return self.rundir.path / "activations"

    def stage(self, partition: int, *, learns: bool, total_steps: int = 1) -> ActivePartition:
        """A partition on the device, ready to work; the caller unloads its residency.

        Args:
            partition: its number.
            learns: with the optimizer and its state.
            total_steps: optimizer steps that its learning rate's schedule stretches over.

        Raises:
            BudgetError: it does not fit.
        """
        planned, workload = self.plan.partitions[partition], self.workload
        title = self.plan.title(partition, [layer.name for layer in workload.chain.layers])
        self.display.enter(title)
        residency = Residency(
            workload.chain, planned.start, planned.stop, self.device, workload.optimizer(partition) if learns else None
        )
        with self.threads.stalls.waiting("disk"), self.weights.tensors(self.device.host_empty()) as reader:
            residency.load(reader, self.threads.read)
        stage = ActivePartition(
            number=partition,
            title=title,
            residency=residency,
            objective=workload.objective(self.plan, partition),
            batch_size=planned.batch,
            micro_batch=self.state.micro_batches[partition],
            smallest_micro_batch=self.plan.smallest_micro_batch,
            is_last=partition == len(self.plan.partitions) - 1,
            loss_scale=self.state.loss_scales[partition],
            learning_rate=lambda step: workload.learning_rate(partition, step, total_steps, planned.batch),
            clip_norm=workload.config.clip_norm,
            chunk_rows=self.plan.loss_chunk,
            shuffle=workload.config.value_for("shuffle", partition),
            steps_in_backward=workload.config.step_in_backward,
        )
        try:
            self.executor.prepare(stage)
        except BaseException:
            residency.unload()
            raise
        return stage

    def save(self, stage: ActivePartition) -> Sequence[int]:
        """A stage's weights and optimizer state to a working file: the `Save` of its visits.

        Raises:
            DivergedError: a weight is no longer finite.
        """
        # A commit must be one that training can go on from: an infinite gradient shows only in the weights.
        if (name := stage.residency.first_infinite()) is not None:
            raise DivergedError(
                f"weight {name!r} is no longer finite in {stage.title}; the last commit is kept; try a lower --lr"
            )
        with self.weights.writer(stage.number) as writer:
            stage.residency.save(writer)
        return (stage.number,)

    def loader(self, stack: ExitStack, partition: int, split: SplitName, folder: Path | None) -> Loader:
        """`open_loader`, closed by the stack."""
        loader = self.open_loader(partition, split, folder)
        stack.callback(loader.close)
        return loader

    def open_loader(self, partition: int, split: SplitName, folder: Path | None) -> Loader:
        """The samples of one part of the data at a partition's boundary; the caller closes it.

        Args:
            partition: its number.
            split: which part.
            folder: of the store that the partition before has written; None for the first partition, which reads the data set.
        """
        seed, pool = self.workload.config.seed, self.threads.read
        if partition == 0:
            augments = split == "train" and self.workload.config.augment != "none"
            return DatasetLoader(self.workload.splits[split], seed, pool, mix=split == "train", augments=augments)
        assert folder is not None, "the partition before has written its outputs"
        # Training samples may stay in memory from epoch to epoch while the validation set passes through.
        window = self._io.window_bytes if split == "train" else self._io.window_bytes // 2
        return ShardLoader(ActivationStore.open(folder, counter=self.counter), seed, pool, window)

    def synthetic_label_loader(self, partition: int) -> Loader:
        """The synthetic labels of the boundary before a partition as its training samples.

        Args:
            partition: not the first.
        """
        workload = self.workload
        objective = workload.objective(self.plan, partition - 1)
        assert isinstance(objective, SyntheticLabels)
        objective.prepare(torch.device("cpu"))
        return SyntheticLabelLoader(workload.splits["train"], objective.codes, workload.config.seed)

    def write(
        self, stage: ActivePartition, loader: Loader, folder: Path, *, may_stop: bool = True, kept_as: KeptAs = "float32"
    ) -> None:
        """Send a loader through a stage, into a new store.

        Args:
            stage: resident.
            loader: at its boundary.
            folder: of the new store.
            may_stop: nothing is lost if the run ends here.
            kept_as: of a store that a partition learns from; what the model is measured on stays exact.

        Raises:
            ConfigError: an output cannot be kept as that.
            Stopped: the run was asked to stop.
        """
        if folder.exists():
            shutil.rmtree(folder)  # what an earlier process wrote and never committed
        folder.parent.mkdir(exist_ok=True)
        specs = self.workload.chain.boundaries[self.plan.partitions[stage.number].stop]
        writer = ActivationWriter(
            folder,
            specs,
            loader.num_samples,
            self._io.shard_bytes,
            self.threads.write,
            self.counter,
            self.threads.beside,
            label_shape=self.workload.dataset.label_shape,
            kept_as=kept_as,
        )
        try:
            with writer:
                self.executor.emit(stage, loader, writer, self.stop_if_asked if may_stop else lambda: None)
        except OverflowFault as fault:
            others = "float32" if kept_as == "bfloat16" else "bfloat16 or float32"
            raise ConfigError(
                f"{stage.title} gives {fault.value:g} at its boundary, and --activation-dtype {kept_as} ends at {fault.limit:g}; "
                f"begin again with {others}"
            ) from None

    def _note_shrink(self, stage: ActivePartition) -> None:
        self.update_record()
        self.state.micro_batches[stage.number] = stage.micro_batch
        self.state.oom_retries += 1
        self.display.message(f"{stage.title}: out of memory; going on with a micro-batch of {stage.micro_batch}")


def roll_back_with_smaller_micro_batch(run: Run, micro_batch: int) -> int:
    """Return to the last commit.

    Args:
        run: nothing of it is resident.
        micro_batch: samples on the device at once that did not fit.

    Returns:
        The micro-batch to go on with.

    Raises:
        BudgetError: it is the smallest already.
    """
    used, smallest = run.device.section_peak_bytes(), run.plan.smallest_micro_batch
    if micro_batch <= smallest:
        raise BudgetError(
            f"memory ran out with a micro-batch of {micro_batch}, the smallest: {format_bytes(used)} of "
            f"{format_bytes(run.device.budget_bytes)} were in use; give a larger --max-gpu-mem, or more partitions"
        )
    run.go_back()
    gc.collect()  # exceptions and the frames of other threads may hold tensors in cycles
    run.device.release()
    run.device.begin_section()
    run.state.oom_retries += 1
    half = max(smallest, micro_batch // 2)
    run.display.message(f"out of memory; going on from the last commit with a micro-batch of {half}")
    return half
