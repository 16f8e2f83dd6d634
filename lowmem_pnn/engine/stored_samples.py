"""Samples at a boundary whose activations were written once, in the order in which the data set itself would come."""

from collections.abc import Iterator
from concurrent.futures import Executor

import numpy as np

from lowmem_pnn.engine.loaders import read_ahead
from lowmem_pnn.engine.stalls import StallKind
from lowmem_pnn.samples.augment import AugmentationKey
from lowmem_pnn.samples.epochs import training_order
from lowmem_pnn.stores.activations import ActivationStore, Batch


class StoredSampleLoader:
    """Loader of the outputs of a frozen part of the model: the same batches as `DatasetLoader`'s, of activations instead of samples.

    It reads one batch ahead, row by row.

    Args:
        store: activations of all training samples, written in the permutation of the seed.
        seed: seed of the run.
        pool: pool of one thread, which reads the next batch while the present one is used.
        phase: word that seeds the order of shuffled epochs.
    """

    stall_kind: StallKind = "disk"

    def __init__(self, store: ActivationStore, seed: int, pool: Executor, *, phase: str) -> None:
        self.num_samples = store.num_samples
        self._store, self._seed, self._pool, self._phase = store, seed, pool, phase
        written = training_order(self.num_samples, seed, phase, 0, shuffle=False)
        self._places = np.empty_like(written)
        self._places[written] = np.arange(self.num_samples)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool,
        epoch: int = 0,
        start: int = 0,
        augmentation_key: AugmentationKey | None = None,
    ) -> Iterator[Batch]:
        """Iterate as `Loader.batches` does; nothing is augmented."""
        order = training_order(self.num_samples, self._seed, self._phase, epoch, shuffle=shuffle)
        yield from read_ahead(self._pool, self._store.rows, self._places[order], batch_size, start)

    def close(self) -> None:
        """Do nothing: no file or memory is held between epochs."""
