"""Weights in a file of `torch.save`: a `state_dict`, or a checkpoint with one in it, read without being whole in memory.

Every storage goes from the file into a mapped file of its own as soon as torch has read it, in both of torch's formats. (`mmap=True`
would map the whole file privately, which the operating system's limit counts, and takes one of the formats alone.)
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_pnn.device import is_out_of_memory
from lowmem_pnn.errors import CheckpointError, ConfigError, LowMemError
from lowmem_pnn.pretrained.state_dicts import layouts_of, tensors_of
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.stores.disk import sha256
from lowmem_pnn.stores.header import TensorLayout
from lowmem_pnn.zoo.deferred_init import FileBacked

# torch's stubs disagree on what a storage is.
Storage = Any


class TorchFile:
    """Weights in a file of `torch.save`.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.where = str(path)

    def layouts(self) -> Mapping[str, TensorLayout]:
        """Return element type and shape of every tensor by name.

        Raises:
            CheckpointError: the file is damaged.
            ConfigError: it holds no `state_dict`.
        """
        return layouts_of(self._tensors(lambda storage: torch.UntypedStorage(storage.nbytes(), device="meta")), self.where)

    @contextmanager
    def reading(self, folder: Path) -> Iterator[Callable[..., Tensor]]:
        """Return a context with a function that reads one tensor, or some elements of it, flat.

        Args:
            folder: folder of the mapped files, which have no names.
        """
        files = FileBacked(folder, at_least=1)

        def moved(storage: Storage) -> Storage:
            if not storage.nbytes():
                return storage
            values = torch.empty(0, dtype=torch.uint8).set_(storage)
            mapped = files.map_like(values).copy_(values)
            files.evict(mapped)
            return mapped.untyped_storage()

        tensors = self._tensors(moved)

        def read(name: str, elements: slice | None = None) -> Tensor:
            tensor = tensors[name].detach().contiguous()
            return tensor if elements is None else tensor.view(-1)[elements]

        yield read

    def sha256(self) -> str:
        """Return the hash of the file."""
        return sha256(self._path)

    def _tensors(self, move: Callable[[Storage], Storage]) -> Mapping[str, Tensor]:
        try:
            # In mapped files from the first byte on: torch makes a tensor of a storage without an operation that a mode would see.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sparse tensors, which are refused below
                found: Any = torch.load(self._path, map_location=lambda storage, location: move(storage), weights_only=True)
        except Exception as error:  # of a pickle, an archive, or the drive
            if isinstance(error, LowMemError) or is_out_of_memory(error):
                raise
            if "Unsupported global" in str(error) or "Unsupported class" in str(error):
                raise ConfigError(
                    f"--weights {self.where} holds more than tensors, such as a whole module, which would run its code; save "
                    "model.state_dict() instead, by torch.save or safetensors"
                ) from error
            if "sparse" in str(error).lower() or "meta tensor" in str(error):
                raise ConfigError(f"--weights {self.where} holds sparse tensors; make them dense") from error
            raise CheckpointError(
                f"--weights {self.where} is no whole file of torch.save ({one_line(error)}); fetch the file again"
            ) from error
        return tensors_of(found, self.where)
