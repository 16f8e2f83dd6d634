"""Models of torchvision and timm: builders by name, their pretrained weights as their own clients fetch them, and the images these take."""

import functools
import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.sources.image_stats import ImageStats
from lowmem_pnn.sources.imports import did_you_mean, import_torchvision, one_line

# Arguments of timm.create_model that would load weights into a model that is whole in memory.
_LOADING = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_TIMM_FILES = ("model.safetensors", "pytorch_model.bin")


class PretrainedValues(Protocol):
    """Pretrained weights, of which nothing is read before it is asked for."""

    @property
    def where(self) -> str:
        """Where they are, in words."""
        ...

    def are_there(self) -> bool:
        """Decide whether they can be read without fetching anything."""
        ...

    def layouts(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return element type and shape of every tensor by name."""
        ...

    def reading(self, folder: Path) -> AbstractContextManager[Callable[..., Tensor]]:
        """Return a context with a function that reads one tensor, or some of its elements (`elements`, a slice of the flat tensor).

        Files may be mapped in the folder meanwhile.
        """
        ...

    def sha256(self) -> str:
        """Return a hash of all that is read."""
        ...


def import_timm() -> ModuleType:
    """Import timm, which is an extra, and slow to import.

    Raises:
        ConfigError: it is not installed, or does not import.
    """
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != "timm":
            raise ConfigError(f"timm needs {error.name!r}, which is not installed; run: pip install {error.name}") from error
        raise ConfigError("timm is not installed; run: pip install 'lowmem-pnn[timm]'") from error
    except (ImportError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"importing timm failed with {one_line(error)}; run: pip install --upgrade timm") from error


def timm_builder(spec: str, arguments: Mapping[str, Any]) -> tuple[str, Callable[..., nn.Module]]:
    """Return the name of a timm model, and what builds it with random weights.

    Args:
        spec: `timm:NAME`, where the name may have the tag of its weights (`timm:resnet18.a1_in1k`).
        arguments: keyword arguments of `timm.create_model`.

    Raises:
        ConfigError: timm is not installed, has no such model, or the arguments ask it for weights.
    """
    timm, name = import_timm(), spec.removeprefix("timm:")
    architecture, dot, tag = name.partition(".")
    if not timm.is_model(architecture):
        guess = did_you_mean(architecture, timm.list_models()) if architecture else "; write timm:resnet18"
        raise ConfigError(f"timm has no model {name!r}{guess if 'did you mean' in guess or not architecture else ''}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if dot and tag not in tags:
        raise ConfigError(f"timm has no weights {tag!r} of {architecture!r}{did_you_mean(tag, tags)}")
    for argument in _LOADING:
        if arguments.get(argument):
            raise ConfigError(
                f"model {spec!r}: {argument}={arguments[argument]!r} is not supported, weights are not built with the model; give "
                "--weights default, or --weights FILE"
            )
    return name, functools.partial(timm.create_model, name)


def timm_image_stats(name: str) -> ImageStats | None:
    """Return how images are prepared for timm's own weights of a model; None where it has none."""
    found = import_timm().get_pretrained_cfg(name)
    if found is None or not (found.hf_hub_id or found.url):
        return None
    return ImageStats(tuple(found.mean), tuple(found.std), tuple(found.input_size[1:]))


def timm_weights(name: str) -> Path:
    """Fetch timm's own weights of a model, from the Hugging Face hub or by torch's, and return their file in its client's cache.

    Raises:
        ConfigError: the model has none, or they cannot be fetched.
    """
    found = import_timm().get_pretrained_cfg(name)
    if found is None or not (found.hf_hub_id or found.url) or found.custom_load:
        raise ConfigError(f"timm has no weights of {name!r} that can be read by name; give --weights FILE")
    if not found.hf_hub_id:
        return _from_url(found.url, f"timm:{name}")
    hub, errors = importlib.import_module("huggingface_hub"), importlib.import_module("huggingface_hub.errors")
    repository, _, revision = found.hf_hub_id.partition("@")
    files = (found.hf_hub_filename,) if found.hf_hub_filename else _TIMM_FILES
    for file in files:
        try:
            return Path(hub.hf_hub_download(repository, file, revision=revision or None))
        except errors.EntryNotFoundError as error:
            # Without a network it is not known whether the file is there.
            if isinstance(error, errors.LocalEntryNotFoundError) or file == files[-1]:
                raise _not_fetched(f"timm:{name}", repository, error) from error
        except Exception as error:  # whatever the client raises for a network that is not there
            raise _not_fetched(f"timm:{name}", repository, error) from error
    raise AssertionError("the last file returns or raises")


def torchvision_image_stats(name: str) -> ImageStats | None:
    """Return how images are prepared for torchvision's own weights of a classifier; None where it has none."""
    if (weights := _torchvision_default(name)) is None:
        return None
    preset = weights.transforms()
    [size] = preset.crop_size
    return ImageStats(tuple(preset.mean), tuple(preset.std), (size, size))


def torchvision_weights(name: str) -> Path:
    """Fetch torchvision's own weights of a classifier, and return their file in torch's cache.

    Raises:
        ConfigError: it has none, or they cannot be fetched.
    """
    if (weights := _torchvision_default(name)) is None:
        raise ConfigError(f"torchvision has no weights of {name!r}; give --weights FILE, or none")
    return _from_url(weights.url, name)


def torchvision_files(name: str) -> set[str]:
    """Return the names of the files that torchvision has weights of a classifier in."""
    return {member.url.rpartition("/")[2] for member in import_torchvision("models").get_model_weights(name)}


def _torchvision_default(name: str) -> Any:
    """Return the member that torchvision means by `DEFAULT`; None for a model without weights."""
    return getattr(import_torchvision("models").get_model_weights(name), "DEFAULT", None)


def _from_url(url: str, name: str) -> Path:
    """Return a file of torch's hub, downloaded if it is not in its cache."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.exists():
        return path
    found = torch.hub.HASH_REGEX.search(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), found.group(1) if found else None, progress=False)
    except Exception as error:  # of the network, of the disk, or a hash that differs
        raise _not_fetched(name, url, error) from error
    return path


def _not_fetched(name: str, where: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"the weights of {name} cannot be fetched from {where}: {one_line(error)}; see to the network, or give --weights FILE"
    )
