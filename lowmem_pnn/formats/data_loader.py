"""PyTorch's data loaders as data: their data set, batch size, order and collation are taken, or refused in words."""

from typing import Any

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

from lowmem_pnn.errors import DataError
from lowmem_pnn.formats.collated import CollatedDataset
from lowmem_pnn.sources.given import require_map_style


def loader_options(data: Any) -> dict[str, Any]:
    """Return the options that a data loader of training data stands for.

    These are `batch_size`, `shuffle` where it is off, `drop_last` where it is on, and with a sampler of its own no share to validate on.

    Args:
        data: What was given as training data.

    Example:
        >>> loader_options(DataLoader(range(8), batch_size=4)), loader_options([])
        ({'batch_size': 4, 'shuffle': False}, {})
    """
    if not isinstance(data, DataLoader) or data.batch_size is None:
        return {}
    options: dict[str, Any] = {"batch_size": data.batch_size}
    if own_sampler(data) is None and type(data.sampler) is SequentialSampler:
        options["shuffle"] = False
    if own_sampler(data) is not None:
        # It draws from all samples, so that none is left to validate on.
        options["val_fraction"] = 0.0
    return {**options, "drop_last": True} if data.drop_last else options


def own_sampler(data: Any) -> Any:
    """Return the sampler of a data loader that draws other samples than each of them once; None where there is no such.

    Args:
        data: What was given as training data.
    """
    if not isinstance(data, DataLoader) or data.batch_size is None:
        return None
    sampler: Any = data.sampler
    return None if type(sampler) is SubsetRandomSampler or _is_of_all(sampler, data.dataset) else sampler


def _is_of_all(sampler: Any, dataset: Any) -> bool:
    """Decide whether a sampler gives each sample once, in order or shuffled."""
    if type(sampler) is SequentialSampler:
        # What has no length is refused in other words.
        return sampler.data_source is dataset or len(sampler) == len(dataset)
    return type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(dataset)


def without_loader(data: Any, where: str, *, trains: bool = False) -> Any:
    """Return the data set of a data loader, its samples collated as it does; other data as it is.

    Args:
        data: What was given as data.
        where: Name of the data in messages.
        trains: Whether it is training data, whose batches are made as `loader_options` and `own_sampler` say.

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
    # One that is derived from it may give others, by indices of the whole data set: it is a sampler of its own.
    if type(sampler) is SubsetRandomSampler:
        dataset = Subset(dataset, [int(index) for index in sampler.indices])
    elif own_sampler(data) is not None and not trains:
        raise DataError(
            f"{where} is a DataLoader with a {type(sampler).__name__}, and all samples are measured, once each; give one with shuffle=False, or "
            "its data set (loader.dataset)"
        )
    left = len(sampler) % data.batch_size
    if data.drop_last and left and not trains:
        if type(sampler) is not SequentialSampler:
            raise DataError(
                f"{where} is a DataLoader that leaves out {left} samples by chance (shuffle=True, drop_last=True), and all are measured here; "
                "give drop_last=False"
            )
        dataset = Subset(dataset, range(len(sampler) - left))
    if data.collate_fn in (default_collate, default_convert):
        return dataset
    return CollatedDataset(dataset, data.collate_fn, where)
