"""A run in its directory: where it is in its method's program, and how its state moves on with it."""

import gc
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.executor import Executor
from lowmem_pnn.engine.out_of_memory import halved, library_said
from lowmem_pnn.engine.tally import EpochProgress, Tally
from lowmem_pnn.errors import BudgetError
from lowmem_pnn.methods import Objective, Sweep, Visit, visits_of_rank
from lowmem_pnn.model.layer import python_state_of, set_python_state
from lowmem_pnn.model.precision import LossScale
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.run.commits import Commits
from lowmem_pnn.run.metrics import Metrics
from lowmem_pnn.run.partitions import Partitions
from lowmem_pnn.run.session import Session
from lowmem_pnn.run.state import Best, PartitionRecord, Stage, State
from lowmem_pnn.stores.keys import CommittedFile
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.tasks.scores import DIRECTIONS
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import Workload


class Run:
    """A run in its directory.

    Args:
        session: the process's side of the run.
        workload: model, data and method.
        plan: partitions of the model.
        weights: weight files of the run, as of the last commit.
        state: state of the run, as of the last commit; while training goes on, only the run, its metrics and its commits change it.

    `partitions` loads and saves them, `metrics` counts and logs, `commits` makes the state durable.
    """

    def __init__(self, session: Session, workload: Workload, plan: Plan, weights: WeightStore, state: State) -> None:
        self.session = session
        self.workload = workload
        self.plan = plan
        self.weights = weights
        self.state = state
        self._said_uncounted = self._said_unmeasured = False
        whole_program = workload.program(plan.spans)
        self.program = visits_of_rank(whole_program, state.rank, state.ranks)
        executor = Executor(session.device, workload.config.seed, self._note_shrink, session.threads.stalls)
        self.partitions = Partitions(session, workload, plan, weights, state, executor)
        self.metrics = Metrics(session, workload, plan, self.program, state)
        self.commits = Commits(session, workload.config, weights, state, self.metrics, workload.chain)
        workload.chain.set_python_state({**workload.chain.python_state, **state.module_state})

    # The way through the program.

    @property
    def item(self) -> Visit | Sweep | None:
        """The visit or sweep that is under way or comes next; None at the program's end."""
        return self.program[self.state.visit] if self.state.visit < len(self.program) else None

    def complete_item(self) -> None:
        """Go on to the next visit or sweep of the program."""
        self.state.visit += 1
        self.state.progress = EpochProgress()
        if isinstance(self.item, Sweep):
            self.state.progress.epoch, self.state.epochs_behind = self.state.epochs_behind, 0
        self.state.without_gain = 0  # what is unfrozen has its own time to make things better
        self._drop_unread_stores()

    def complete_epoch(self, partition: int) -> None:
        """Record the training loss of an epoch that is over, and begin to count the next.

        Args:
            partition: number of the partition whose record tells the loss.
        """
        progress, item = self.state.progress, self.item
        tally, progress.tally = progress.tally, Tally()
        if isinstance(item, Visit) and item.macro_batch is not None:
            tally = self._of_the_whole_epoch(partition, tally, begins=item.begins_epoch)
        self.state.records[partition].train_loss = tally.loss

    def _of_the_whole_epoch(self, partition: int, tally: Tally, *, begins: bool) -> Tally:
        """Return what the macro-batches of the present epoch come to so far, with the one that is over."""
        tallies = self.state.epoch_tallies = self.state.epoch_tallies or [Tally() for _ in self.plan.partitions]
        if begins:
            tallies[partition] = Tally()
        tallies[partition].merge(tally)
        return tallies[partition]

    def count_of(self, objective: Objective, labels: Tensor) -> float:
        """Return what a batch's mean loss is over; the first time that nothing counts is said.

        Args:
            objective: what is learnt.
            labels: targets of the batch, on the host.
        """
        if (count := objective.count(labels)) > 0:
            return count
        if not self._said_uncounted:
            self._said_uncounted = True
            self.session.display.message(
                "a batch has no label that counts: it is left out, without a step (and so are others like it)"
            )
        return 0.0

    def record_validation(
        self, partition: int, tally: Tally, layers: Sequence[Tally] = (), scores: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Record what was measured of a partition on the validation split.

        Args:
            partition: number of the partition.
            tally: loss and accuracy of its outputs.
            layers: the same of each of its layers, where these have scores of their own.
            scores: other scores by name, where one of them is watched; those that are no finite number are left out.
        """
        record = self.state.records[partition]
        record.val_loss = tally.loss if tally.loss is not None and math.isfinite(tally.loss) else None
        if tally.loss is None and not self._said_unmeasured:
            self._said_unmeasured = True
            self.session.display.message("no label of the validation part counts: it has no loss")
        record.val_accuracy = tally.accuracy
        record.val_scores = {
            name: float(value)
            for name, value in scores.items()
            if name not in ("loss", "accuracy") and isinstance(value, int | float) and math.isfinite(value)
        }
        accuracies = [layer.accuracy for layer in layers if layer.accuracy is not None]
        if layers and len(accuracies) == len(layers):  # regression has none, and no exit is chosen by what was not measured
            record.unit_val_accuracies = accuracies

    # The best validation, and the end of patience.

    def watch(self, partition: int, step: int) -> bool:
        """Compare the present validation with the best one before it, where the options watch it.

        Args:
            partition: number of the partition whose record tells the validation.
            step: optimizer steps by now.

        Returns:
            Whether it is the best so far, and its weights are to be kept.
        """
        config, state = self.workload.config, self.state
        if not (config.watches and self.is_watched):
            return False
        record, (direction, monitor) = state.records[partition], config.monitored
        name = monitor.removeprefix("val_")
        value = {"loss": record.val_loss, "accuracy": record.val_accuracy, **record.val_scores}.get(name)
        before, least = state.best.value, (direction or DIRECTIONS[name]) == "min"
        better = value is not None and (before is None or (value < before if least else value > before))
        state.without_gain = 0 if better else state.without_gain + 1
        if better:
            epoch = self.epochs_before + state.progress.epoch
            state.best = Best(epoch, step, value, module_state=self.workload.chain.python_state)
        return better and config.keep_weights == "best"

    @property
    def is_watched(self) -> bool:
        """Whether what learns now are the last epochs of the model's own task, of which validation tells the end, and the best weights."""
        item, recovers = self.item, self.workload.config.recovery_epochs > 0
        if isinstance(item, Sweep):
            return not recovers or item.phase == "recovery"
        return not recovers and item is not None and item.partition == len(self.plan.partitions) - 1

    def is_out_of_patience(self) -> bool:
        """Return whether so many validations went by without a better one that training is to end."""
        config = self.workload.config
        if config.early_stop is None or not self.is_watched or (self.item is not None and self.item.frozen):
            return False
        return self.state.without_gain >= config.early_stop

    @property
    def epochs_before(self) -> int:
        """Epochs of the visits or sweeps whose training the present one goes on with."""
        return 0 if self.item is None else self.item.epochs_before

    def stop_early(self, step: int) -> None:
        """Note that training ends before its last epoch.

        Args:
            step: optimizer steps by now.
        """
        state, config = self.state, self.workload.config
        assert state.visit == len(self.program) - 1, "what is frozen at first is trained for all of its epochs"
        epoch = self.epochs_before + state.progress.epoch
        state.stopped_after, state.stopped_step = epoch, step
        now, best = f"epoch {epoch}", f"epoch {state.best.epoch}"
        if config.eval_every is not None:
            now, best = f"step {step}", f"step {state.best.step}"
        why = f"was best after {best}" if state.best.value is not None else "was never a finite number"
        self.session.display.message(f"training ends after {now}: {config.monitor} {why}")

    def take_best(self) -> None:
        """Have what comes after training take the weights of the best epoch, every byte of them checked."""
        best = self.state.best
        if self.workload.config.keep_weights == "best" and best.weights:
            self.weights.restore(best.weights)
            self.workload.chain.set_python_state(best.module_state)
            self.state.module_state = self.workload.chain.python_state

    # Stores of activations that later visits read.

    def store_of(self, key: str) -> str | None:
        """Return the name of the store that the partition before has written; None where there is none.

        Args:
            key: split, or split and view, of its samples.
        """
        return self.state.activations.get(key)

    def replace_store(self, key: str, name: str) -> None:
        """Have later visits read a store that is complete, instead of the one before it; the visit that wrote it is over, as after an epoch.

        Args:
            key: split, or split and view, of its samples.
            name: name of the store's folder.
        """
        if (before := self.state.activations.get(key)) is not None:
            self.commits.drop_store(before)
        self.state.activations[key] = name
        self.state.progress.epoch = 1

    def forget_stores(self) -> None:
        """Have the next commit name no stores, since nothing after training needs the boundaries."""
        self.state.activations = {}

    def _drop_unread_stores(self) -> None:
        """Delete the stores that no later visit reads: the next one begins with the data set, or belongs to a sweep."""
        item = self.item
        if isinstance(item, Sweep) and item.first > 0:
            return
        if isinstance(item, Visit) and (item.partition != 0 or item.action == "emit"):
            return
        for name in self.state.activations.values():
            self.commits.drop_store(name)
        self.state.activations = {}

    # Micro-batches, which are part of the results.

    def roll_back_with_smaller_micro_batch(self, partition: int | None) -> None:
        """Return to the last commit, since memory ran out when some weights had been stepped, with half the micro-batch.

        No partition may be resident.

        Args:
            partition: number of the partition that did not fit; None for a sweep, which has one micro-batch for all.

        Raises:
            BudgetError: the micro-batch is the smallest already.
        """
        device, state = self.session.device, self.state
        micro_batch = state.sweep_micro_batch if partition is None else state.micro_batches[partition]
        used = device.section_peak_bytes()
        half = None if self.plan.whole_batches else halved(micro_batch, self.plan.smallest_micro_batch)
        if half is None:
            raise BudgetError(
                f"memory ran out with a micro-batch of {micro_batch}, the smallest: {format_bytes(used)} of "
                f"{format_bytes(device.budget_bytes)} were in use{library_said()}; "
                f"begin a new run with a larger --max-gpu-mem, or more partitions"
            )
        self.commits.roll_back()
        gc.collect()  # exceptions and the frames of other threads may hold tensors in cycles
        device.release()
        device.begin_section()
        state.oom_retries += 1
        self.session.display.message(f"out of memory; going on from the last commit with a micro-batch of {half}")
        self.set_micro_batch(partition, half)

    def set_micro_batch(self, partition: int | None, micro_batch: int) -> None:
        """Go on with another micro-batch.

        Args:
            partition: number of the partition; None for sweeps, which have one micro-batch for all.
            micro_batch: samples on the device at once.
        """
        if partition is None:
            self.state.sweep_micro_batch = micro_batch
        else:
            self.state.micro_batches[partition] = micro_batch

    def _note_shrink(self, active: ActivePartition) -> None:
        self.metrics.update_record()
        self.set_micro_batch(active.number, active.micro_batch)
        self.state.oom_retries += 1
        self.session.display.message(f"{active.title}: out of memory; going on with a micro-batch of {active.micro_batch}")

    # From one status to the next.

    def replan(self, plan: Plan) -> None:
        """Note another plan in the state, before anything is trained; the caller begins anew with the plan's own weight files.

        Args:
            plan: the new plan.
        """
        state = self.state
        state.plan = json.loads(plan.to_json())
        state.micro_batches = [part.micro_batch for part in plan.partitions]
        state.sweep_micro_batch = plan.sweep_micro_batch
        state.records = [PartitionRecord() for _ in plan.partitions]
        state.loss_scales = [LossScale.initial(self.workload.config.precision) for _ in plan.partitions]

    def begin_training(self, check: dict[str, int], compared: Literal["yes", "no"]) -> None:
        """Commit the initial weights: from now on the run can be resumed.

        Args:
            check: prediction and measurement of the check before training.
            compared: whether the model was compared with its layers.
        """
        self.workload.chain.set_python_state(self.state.module_state)  # as the constructor left it, whatever was tried since
        self.state.check, self.state.compared = check, compared
        self.state.stage = "training"
        self.state.weights = self.weights.state()
        self.commits.commit()

    def end(self, stage: Stage, files: Mapping[str, CommittedFile] | None = None) -> None:
        """Commit a stage after which nothing is trained any more, and wait until it is durable.

        Args:
            stage: `trained` where another rank joins the partition, `done` where the result is written.
            files: what the run leaves, by name.
        """
        self.state.stage = stage
        self.state.files = {name: asdict(file) for name, file in (files or {}).items()}
        self.commits.commit()
        self.commits.wait()

    def record_losses(self, partition: int, layers: Sequence[Tally]) -> None:
        """Record the validation losses of a partition's layers, where anything counted; one not finite as the largest number there is.

        Args:
            partition: number of the partition.
            layers: what was measured of each layer that has scores of its own.
        """
        losses = [layer.loss for layer in layers if layer.loss is not None]
        if len(losses) == len(layers):
            bounded = [loss if math.isfinite(loss) else sys.float_info.max for loss in losses]
            self.state.records[partition].unit_val_losses = bounded

    def note_meta_model(self, facts: dict[str, Any], oom_retries: int) -> None:
        """Record what the training of the meta model came to.

        Args:
            facts: what the result says of it.
            oom_retries: how often its micro-batch was halved.
        """
        self.state.meta = facts
        self.state.oom_retries += oom_retries

    def take_over(self, partition: int, theirs: State) -> None:
        """Take over what another process has recorded of the partition that it trained.

        Args:
            partition: number of the partition.
            theirs: state of the other process's run.
        """
        self.state.records[partition] = theirs.records[partition]
        self.state.micro_batches[partition] = theirs.micro_batches[partition]
        self.state.loss_scales[partition] = theirs.loss_scales[partition]
        part = self.plan.partitions[partition]
        layers = self.workload.chain.layers[part.start : part.stop]
        own = python_state_of(layers)
        set_python_state(layers, {**own, **theirs.module_state})
        self.state.oom_retries += theirs.oom_retries
        self.session.counter.add(read=theirs.bytes_read, written=theirs.bytes_written)
