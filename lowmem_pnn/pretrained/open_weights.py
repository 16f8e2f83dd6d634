"""Opening of pretrained weights by what the option says: `default`, a file, or a folder; nothing is read or fetched before it is needed."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

from torch import Tensor

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.pretrained.safetensors_files import SafetensorsFiles
from lowmem_pnn.pretrained.torch_file import TorchFile
from lowmem_pnn.stores.header import TensorLayout
from lowmem_pnn.zoo.model_source import ModelSource

_INDEX = ".safetensors.index.json"
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_IN_FOLDERS = ("model.safetensors", f"model{_INDEX}", "pytorch_model.bin")


class WeightFiles:
    """Pretrained weights in files, found and fetched when they are first asked for.

    Args:
        spec: `default`, or a path of a file or folder.
        source: model that they are for.
    """

    def __init__(self, spec: str, source: ModelSource) -> None:
        self._spec = spec
        self._source = source

    @property
    def where(self) -> str:
        """The path, after `default` that of the fetched file."""
        return f"default ({self._files.where})" if self._spec == "default" else self._files.where

    def are_there(self) -> bool:
        """Decide whether the files are there to be read; those of `default` are their client's, and may have to be fetched."""
        return Path(self._spec).exists()

    def layouts(self) -> Mapping[str, TensorLayout]:
        """Return element type and shape of every tensor by name."""
        return self._files.layouts()

    def reading(self, folder: Path) -> AbstractContextManager[Callable[..., Tensor]]:
        """Return a context with a function that reads one tensor, or some elements; files may be mapped in a folder meanwhile."""
        return self._files.reading(folder)

    def sha256(self) -> str:
        """Return a hash of the files."""
        return self._files.sha256()

    @cached_property
    def _files(self) -> SafetensorsFiles | TorchFile:
        if self._spec.startswith("python:"):
            raise ConfigError(
                f"this run was started from Python with weights of its own ({self._spec}); go on with it there: "
                "lowmem_pnn.fit(..., resume=True)"
            )
        if self._spec != "default":
            return _at(Path(self._spec))
        if self._source.default_weights is None:
            raise ConfigError(
                f"--weights default: model {self._source.spec} has no weights of its own, as torchvision's and timm's have; give "
                "--weights FILE, or leave it out"
            )
        return _at(self._source.default_weights())


def _at(path: Path) -> SafetensorsFiles | TorchFile:
    if path.is_dir():
        found = [path / name for name in _IN_FOLDERS if (path / name).is_file()]
        found = found or sorted((*path.glob(f"*{_INDEX}"), *path.glob("*.safetensors")))
        if not found or (len(found) > 1 and found[0].name not in _IN_FOLDERS and not found[0].name.endswith(_INDEX)):
            names = f"{len(found)} weight files ({found[0].name}, ...)" if found else f"none of {', '.join(_IN_FOLDERS)}"
            raise ConfigError(f"--weights: the folder {path} holds {names}; give the path of one file")
        path = found[0]
    if not path.is_file():
        raise ConfigError(f"--weights: there is no file {path}; give default, or a path of a .safetensors, .pt or .pth file")
    if path.suffix == ".safetensors" or path.name.endswith(_INDEX):
        return SafetensorsFiles(path)
    if path.suffix in _TORCH:
        return TorchFile(path)
    raise ConfigError(
        f"--weights: {path} is of no known kind; give a file that ends in .safetensors, {_INDEX}, {', '.join(_TORCH)}, or a folder with one"
    )
