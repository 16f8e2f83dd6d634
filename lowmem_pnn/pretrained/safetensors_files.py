"""Weights in safetensors files: one, or shards that an index (`*.safetensors.index.json`) lists."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.stores.disk import sha256
from lowmem_pnn.stores.header import TensorLayout
from lowmem_pnn.stores.tensor_file import TensorFile

_REMEDY = "fetch the file again"
# An index of a million tensors has less.
_MAX_INDEX_BYTES = 1 << 28


class SafetensorsFiles:
    """Weights in safetensors files.

    Args:
        path: path of the file, or of the index.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.where = str(path)

    def layouts(self) -> Mapping[str, TensorLayout]:
        """Return element type and shape of every tensor by name.

        Raises:
            CheckpointError: a file is damaged or missing, or lacks a tensor that the index says it has.
        """
        layouts: dict[str, TensorLayout] = {}
        for path, names in self._files().items():
            with TensorFile.open(path, remedy=_REMEDY) as file:
                for name in file.entries if names is None else names:
                    if name not in file.entries:
                        raise CheckpointError(
                            f"{str(path)!r} holds no {name!r}, which {str(self._path)!r} says it does; {_REMEDY}"
                        )
                    layouts[name] = (file.entries[name].dtype, file.entries[name].shape)
        return layouts

    @contextmanager
    def reading(self, folder: Path) -> Iterator[Callable[..., Tensor]]:
        """Return a context with a function that reads one tensor, or some elements of it, flat; nothing is made in the folder."""
        with ExitStack() as stack:
            homes: dict[str, TensorFile] = {}
            for path, names in self._files().items():
                file = stack.enter_context(TensorFile.open(path, remedy=_REMEDY))
                homes |= dict.fromkeys(file.entries if names is None else names, file)
            yield lambda name, elements=None: homes[name].read(name, elements=elements)

    def sha256(self) -> str:
        """Return the hash of the file, or one of all shards' hashes."""
        files = list(self._files())
        if files == [self._path]:
            return sha256(self._path)
        return hashlib.sha256("".join(map(sha256, sorted(files))).encode()).hexdigest()

    def _files(self) -> dict[Path, list[str] | None]:
        """Return the files, and the tensors that are wanted of each: of a single file all."""
        if self._path.suffix != ".json":
            return {self._path: None}
        if self._path.stat().st_size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{str(self._path)!r} is too large for an index; {_REMEDY}")
        try:
            weight_map = json.loads(self._path.read_bytes())["weight_map"]
            shards: dict[Path, list[str] | None] = {}
            for name, file in weight_map.items():
                # Beside the index, and nowhere else: an index may come from anybody.
                if Path(file).name != file:
                    raise ValueError(f"it names {file!r}, which is not beside it")
                names = shards.setdefault(self._path.with_name(file), [])
                assert names is not None
                names.append(name)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{str(self._path)!r} is no index of safetensors files ({error}); {_REMEDY}") from None
        for path in shards:
            if not path.is_file():
                raise CheckpointError(f"{str(path)!r} is missing, which {str(self._path)!r} names; fetch all of its files")
        return shards
