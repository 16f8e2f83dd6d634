"""Partitions of a run: onto the device and into their files, with the samples at their boundaries."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import torch

from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.executor import Executor
from lowmem_pnn.engine.loaders import DatasetLoader, Loader, ShardLoader, SyntheticLabelLoader
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.errors import CheckpointError, ConfigError, DivergedError
from lowmem_pnn.methods import SplitName, SyntheticLabels, ThroughTail
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.run.session import Session
from lowmem_pnn.run.state import State
from lowmem_pnn.run.thin_parts import ThinParts
from lowmem_pnn.stores.activation_writer import ActivationWriter
from lowmem_pnn.stores.activations import ActivationStore
from lowmem_pnn.stores.disk import RUN_REMEDY, remove_folder
from lowmem_pnn.stores.encoding import Encoding, OverflowFault
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.workload import Workload


class Partitions:
    """Loads and saves the partitions of a run, and opens the samples at their boundaries.

    Args:
        session: the process's side of the run.
        workload: model, data and method.
        plan: partitions of the model.
        weights: weight files of the run.
        state: state of the run, which tells micro-batches and loss scales; nothing of it is changed here.
        executor: trains and runs the partitions.
    """

    def __init__(
        self, session: Session, workload: Workload, plan: Plan, weights: WeightStore, state: State, executor: Executor
    ) -> None:
        self._session = session
        self._workload = workload
        self._plan = plan
        self._weights = weights
        self._state = state
        self.executor = executor

    @property
    def last(self) -> int:
        """Number of the last partition."""
        return len(self._plan.partitions) - 1

    def title(self, partition: int) -> str:
        """Return a partition's number and layers in words."""
        return self._plan.title(partition, [layer.name for layer in self._workload.chain.layers])

    def load(self, partition: int, *, learns: bool, total_steps: int = 1, frozen: bool = False) -> ActivePartition:
        """Bring a partition onto the device, ready to work; the caller unloads its residency.

        Args:
            partition: number of the partition.
            learns: whether its optimizer and optimizer state are loaded too.
            total_steps: optimizer steps that its learning rate's schedule stretches over.
            frozen: whether what is to be unfrozen later is frozen yet.

        Raises:
            BudgetError: it does not fit.
        """
        planned, workload, device = self._plan.partitions[partition], self._workload, self._session.device
        threads, config = self._session.threads, workload.config
        title = self.title(partition)
        self._session.display.enter(title)
        optimizer = workload.optimizer(partition) if learns else None
        chain = workload.early.chain if frozen and workload.early is not None else workload.chain
        residency = Residency(chain, planned.start, planned.stop, device, optimizer)
        with threads.stalls.waiting("disk"), self._weights.tensor_reader(device.host_allocator()) as reader:
            residency.load(reader, threads.read)
        objective = workload.objective(self._plan, partition)
        if isinstance(objective, ThroughTail):
            self._thin_parts.attach_tail(objective, partition, trained=bool(self._state.meta))
        active = ActivePartition(
            number=partition,
            title=title,
            residency=residency,
            objective=objective,
            batch_size=planned.batch,
            micro_batch=self._state.micro_batches[partition],
            smallest_micro_batch=self._plan.smallest_micro_batch,
            may_shrink=not self._plan.whole_batches,
            samples_at_once=device.buffer_sizes.samples_at_once(
                planned.start,
                planned.input_bytes_per_sample,
                planned.batch,
                # Where the host is not the device, its memory is not what is scarce.
                smallest=self._plan.smallest_micro_batch
                if device.shares_host and not self._plan.whole_batches
                else planned.batch,
            ),
            is_last=partition == self.last,
            loss_scale=self._state.loss_scales[partition],
            learning_rate=lambda step, base=None: workload.learning_rate(partition, step, total_steps, planned.batch, base),
            clip_norm=config.clip_norm,
            chunk_rows=self._plan.loss_chunk,
            shuffle=config.value_for("shuffle", partition),
            is_frozen_yet=frozen,
            steps_in_backward=config.step_in_backward and not config.steps_wait,
        )
        try:
            self.executor.prepare(active)
        except BaseException:
            residency.unload()
            raise
        return active

    def load_thin(self, partition: int) -> ActivePartition:
        """Bring the thin part of a partition onto the device, to run forward; the caller unloads its residency.

        Args:
            partition: number of the partition.
        """
        active = self.load(partition, learns=False)
        active.residency.unload()
        return self._thin_parts.load(partition, active)

    @cached_property
    def _thin_parts(self) -> ThinParts:
        return ThinParts(self._session, self._workload, self._plan)

    def save(self, active: ActivePartition) -> Sequence[int]:
        """Write a partition's weights and optimizer state to a working file: the `Save` of its visits.

        Args:
            active: the partition.

        Returns:
            The numbers of the partitions whose files changed: its own.

        Raises:
            DivergedError: a weight is no longer finite.
        """
        # A commit must be one that training can go on from: an infinite gradient shows only in the weights.
        if (name := active.residency.nonfinite_parameter()) is not None:
            raise DivergedError(
                f"weight {name!r} is no longer finite in {active.title}; the last commit is kept; try a lower --lr"
            )
        with self._weights.writer(active.number) as writer:
            active.residency.save(writer)
        return (active.number,)

    # Samples at a partition's boundary.

    def loader(self, stack: ExitStack, partition: int, split: SplitName, folder: Path | None) -> Loader:
        """Open samples as `open_loader` does, to be closed by a stack.

        Args:
            stack: closes the loader.
            partition: number of the partition.
            split: part of the data.
            folder: as for `open_loader`.
        """
        loader = self.open_loader(partition, split, folder)
        stack.callback(loader.close)
        return loader

    def open_loader(self, partition: int, split: SplitName, folder: Path | None) -> Loader:
        """Open the samples of one part of the data at a partition's boundary; the caller closes them.

        Args:
            partition: number of the partition.
            split: part of the data.
            folder: store that the partition before has written; None for the first partition, which reads the data set.

        Raises:
            CheckpointError: there is no such store, or it is damaged.
        """
        seed, pool = self._workload.config.seed, self._session.threads.read
        if partition == 0:
            augments = split == "train" and self._workload.draws_anew
            return DatasetLoader(self._workload.splits[split], seed, pool, permuted=split == "train", augments=augments)
        if folder is None:
            raise CheckpointError(
                f"the journal of {self._session.rundir.path} names no {split} samples at the boundary before partition {partition + 1}; "
                f"{RUN_REMEDY}"
            )
        # Training samples may stay in memory from epoch to epoch while the validation set passes through.
        whole_window = self._session.device.buffer_sizes.window_bytes
        window_bytes = whole_window if split == "train" else whole_window // 2
        return ShardLoader(ActivationStore.open(folder, counter=self._session.counter), seed, pool, window_bytes)

    def synthetic_label_loader(self, partition: int) -> Loader:
        """Return the synthetic labels of the boundary before a partition as its training samples.

        Args:
            partition: number of the partition, not the first.
        """
        workload = self._workload
        objective = workload.objective(self._plan, partition - 1)
        assert isinstance(objective, SyntheticLabels)
        objective.prepare(torch.device("cpu"))
        return SyntheticLabelLoader(workload.splits["train"], objective.class_vectors, workload.config.seed)

    def write_outputs(
        self,
        active: ActivePartition,
        loader: Loader,
        folder: Path,
        *,
        on_micro_batch: Callable[[], None] = lambda: None,
        encoding: Encoding = "float32",
    ) -> None:
        """Send samples through a partition, and write its outputs to a new store.

        Args:
            active: the partition.
            loader: samples at its boundary.
            folder: folder of the new store.
            on_micro_batch: called now and then; what it raises ends the writing.
            encoding: type of the stored values; in training those of validation samples too, while what is measured later is exact.

        Raises:
            ConfigError: an output cannot be kept as that type.
        """
        remove_folder(folder)  # what an earlier process wrote and never committed
        folder.parent.mkdir(exist_ok=True)
        threads = self._session.threads
        writer = ActivationWriter(
            folder,
            self._workload.chain.boundaries[self._plan.partitions[active.number].stop],
            loader.num_samples,
            self._session.device.buffer_sizes.shard_bytes,
            threads.write,
            self._session.counter,
            threads.sync,
            labels=self._workload.dataset.targets.spec,
            encoding=encoding,
        )
        try:
            with writer:
                self.executor.emit(active, loader, writer, on_micro_batch)
        except OverflowFault as fault:
            others = "float32" if encoding == "bfloat16" else "bfloat16 or float32"
            raise ConfigError(
                f"{active.title} gives {fault.value:g} at its boundary, and --activation-dtype {encoding} ends at {fault.limit:g}; "
                f"begin again with {others}"
            ) from None
