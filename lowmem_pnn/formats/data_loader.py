"""PyTorch's data loaders as data: their data set, batch size, order and collation are taken, or refused in words."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    default_collate,
    default_convert,
)

from lowmem_pnn.errors import DataError, LowMemError
from lowmem_pnn.sources.given import require_map_style
from lowmem_pnn.sources.imports import one_line

Collate = Callable[[list[Any]], Any]


def loader_options(data: Any) -> dict[str, Any]:
    """Return the options that a data loader of training data stands for: `batch_size`, and `shuffle` where it is off.

    Args:
        data: What was given as training data.

    Example:
        >>> loader_options(DataLoader(range(8), batch_size=4)), loader_options([])
        ({'batch_size': 4, 'shuffle': False}, {})
    """
    if not isinstance(data, DataLoader) or data.batch_size is None:
        return {}
    return {"batch_size": data.batch_size, **({"shuffle": False} if isinstance(data.sampler, SequentialSampler) else {})}


def without_loader(data: Any, where: str) -> Any:
    """Return the data set of a data loader, its samples collated as it does; other data as it is.

    Args:
        data: What was given as data.
        where: Name of the data in messages.

    Raises:
        DataError: The loader has an order of its own, leaves samples out, or collates samples together otherwise than alone.
    """
    if not isinstance(data, DataLoader):
        return data
    dataset: Any = data.dataset
    require_map_style(dataset, f"{where}: the loader's data set")
    sampler: Any = data.sampler
    if data.batch_size is None or type(data.batch_sampler) is not BatchSampler:
        what = (
            f"batches by a {type(data.batch_sampler).__name__}"
            if data.batch_size is None and data.batch_sampler
            else "no batches"
        )
        raise DataError(
            f"{where} is a DataLoader with {what}, and batches are made here; give one with batch_size, or its data set (loader.dataset)"
        )
    if data.drop_last and len(sampler) % data.batch_size:
        raise DataError(
            f"{where} is a DataLoader that leaves out the last {len(sampler) % data.batch_size} samples of an epoch (drop_last=True), and all "
            "are used here; give drop_last=False"
        )
    if isinstance(sampler, SubsetRandomSampler):
        dataset = Subset(dataset, [int(index) for index in sampler.indices])
    elif type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(dataset):
        pass
    elif type(sampler) is not SequentialSampler:
        why = ", which draws with replacement or only some samples" if isinstance(sampler, RandomSampler) else ""
        raise DataError(
            f"{where} is a DataLoader with a {type(sampler).__name__}{why}, and the order is made here (--shuffle); give one with shuffle=True "
            "or False, or its data set (loader.dataset)"
        )
    if data.collate_fn in (default_collate, default_convert):
        return dataset
    return CollatedDataset(dataset, data.collate_fn, where)


class CollatedDataset:
    """Data set whose samples have gone through a loader's `collate_fn`, each alone.

    Args:
        dataset: Map-style data set.
        collate: Makes a batch of a list of samples.
        where: Name of the data in messages.

    Raises:
        DataError: It makes something else of samples together than of each alone, as padding and mixing do.
    """

    def __init__(self, dataset: Any, collate: Collate, where: str) -> None:
        self._dataset, self._collate, self._where = dataset, collate, where
        items = [dataset[number] for number in range(min(2, len(dataset)))]
        together, alone = self._batch(items), [self._batch([item]) for item in items]
        leaves = [pytree.tree_leaves(batch) for batch in alone]
        joined = [torch.cat(parts) if len({part.shape for part in parts}) == 1 else None for parts in zip(*leaves, strict=True)]
        if any(one is None or not _equal(one, whole) for one, whole in zip(joined, pytree.tree_leaves(together), strict=True)):
            raise DataError(
                f"{where}: collate_fn gives other values for two samples together than for each alone; keep padding and mixing out of it: "
                "pad all samples to one length, since each is collated by itself here"
            )

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return pytree.tree_map(lambda tensor: tensor[0], self._batch([self._dataset[index]]))

    def _batch(self, items: Sequence[Any]) -> Any:
        """Return a batch of samples, every leaf of which is a tensor (B, ...)."""
        try:
            batch = self._collate(list(items))
        except (LowMemError, MemoryError):
            raise
        # Whatever a user's function raises is the user's to see, on one line, with the original as the cause.
        except Exception as error:
            raise DataError(f"{self._where}: collate_fn fails: {one_line(error)}; see to the function") from error
        leaves = pytree.tree_leaves(batch)
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == len(items) for leaf in leaves):
            found = ", ".join(str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves[:4])
            raise DataError(
                f"{self._where}: collate_fn makes {found or 'nothing'} of {len(items)} samples; have it return tensors (samples, ...)"
            )
        return batch


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.isclose(one, other, 0, 0, equal_nan=True).all())
