"""Thin parts of a run's meta model: their weights, read from the file that its training left, and the parts as active partitions."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.methods import ThroughTail
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.run.session import Session
from lowmem_pnn.stores.disk import RUN_REMEDY
from lowmem_pnn.stores.keys import weight_key
from lowmem_pnn.stores.run_creation import META_FOLDER
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.workload import Workload, meta_model


class ThinParts:
    """Loads the thin parts of a run's meta model.

    Args:
        session: the process's side of the run.
        workload: model, data and method.
        plan: partitions of the model.
    """

    def __init__(self, session: Session, workload: Workload, plan: Plan) -> None:
        self._session, self._plan = session, plan
        self._meta = meta_model(workload, plan.spans)

    @property
    def _file(self) -> Path:
        return self._session.rundir.path / META_FOLDER / "model.safetensors"

    def attach_tail(self, objective: ThroughTail, partition: int, *, trained: bool) -> None:
        """Have a partition's loss go through the thin parts after it.

        Args:
            objective: the partition's objective.
            partition: number of the partition.
            trained: whether the meta model is trained; before that zeros of the shapes of its weights take their places.
        """
        tail = self._meta.tail(partition)

        def read(position: int, name: str) -> Tensor:
            number, layer = tail[position]
            if not trained:
                shape_of = {**layer.parameters(), **layer.buffers()}[name]
                return torch.zeros(shape_of.shape, dtype=shape_of.dtype)
            return self._reading(number)(weight_key(name))

        objective.attach([layer for _, layer in tail], self._meta.parts[-1].boundaries[-1], read)

    def load(self, partition: int, active: ActivePartition) -> ActivePartition:
        """Bring a thin part onto the device in the place of its partition, to run forward; the caller unloads its residency.

        Args:
            partition: number of the partition.
            active: the partition, unloaded, whose batches and objective the thin part takes over.
        """
        chain, session = self._meta.parts[partition], self._session
        residency = Residency(chain, 0, len(chain.layers), session.device, None, frozen=True)
        with session.threads.stalls.waiting("disk"):
            residency.load(_Reader(self._reading(partition)), session.threads.read)
        active.residency, active.is_thin = residency, True
        active.title = f"the thin part of {active.title}"
        return active

    def _reading(self, part: int) -> Callable[[str], Tensor]:
        """Return what reads a tensor of a thin part by its key."""

        def read(key: str) -> Tensor:
            with TensorFile.open(self._file, counter=self._session.counter, remedy=RUN_REMEDY) as file:
                return file.read(f"{part}.{key.removeprefix(weight_key(''))}")

        return read


class _Reader:
    """Reads tensors as a weight file does."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self.read = read
