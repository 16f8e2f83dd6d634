"""Deferred initialisation: builds models with tensors in mapped files (`file_backed`), or structure without values (`skeleton`).

A constructor fills its tensors from the global random generator, so only the constructor itself can make its values. Under
`file_backed` it runs unchanged, but each large tensor that it makes is a shared mapping of an unlinked file: the kernel writes dirty
pages back, and the process's private memory does not grow with the model.
"""

import errno
import math
import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_pnn.dispatch_mode import DispatchMode
from lowmem_pnn.errors import DiskError
from lowmem_pnn.seeds import seeded
from lowmem_pnn.units import MEBIBYTE, format_bytes

_aten = torch.ops.aten
_META = torch.device("meta")

# Operations that make a tensor from its size alone, and how each fills it. Results of others (arange, mul, cat) are computed by
# torch and then moved, at the price of one private tensor for a moment.
_FILLS: dict[Any, Callable[[Tensor, tuple[Any, ...], Mapping[str, Any]], object]] = {
    # A new file reads as zeros.
    **dict.fromkeys(
        (
            _aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided,
            _aten.zeros, _aten.zeros_like, _aten.new_zeros,
        ),
        lambda out, args, kwargs: None,
    ),
    **dict.fromkeys((_aten.ones, _aten.ones_like, _aten.new_ones), lambda out, args, kwargs: out.fill_(1)),
    **dict.fromkeys((_aten.full, _aten.full_like), lambda out, args, kwargs: out.fill_(args[1])),
    _aten.new_full: lambda out, args, kwargs: out.fill_(args[2]),
    **dict.fromkeys(
        (_aten.rand, _aten.rand_like), lambda out, args, kwargs: out.uniform_(0, 1, generator=kwargs.get("generator"))
    ),
    **dict.fromkeys(
        (_aten.randn, _aten.randn_like), lambda out, args, kwargs: out.normal_(0, 1, generator=kwargs.get("generator"))
    ),
    _aten.clone: lambda out, args, kwargs: out.copy_(args[0]),
}  # fmt: skip


@contextmanager
def file_backed(folder: Path, at_least: int = MEBIBYTE) -> Iterator["FileBacked"]:
    """Keep large CPU tensors that are made in this context in files of `folder`, with the values that they would have in memory.

    Tensors keep their file as long as they live, also after the block. The files have no name, so that nothing is left behind
    however the process ends. On a file system in memory (tmpfs) the tensors are in memory still.

    Args:
        folder: Existing folder on a disk with room for the model.
        at_least: Bytes of the smallest tensor that gets a file.

    Yields:
        The mode that makes the files; its `evict` takes a tensor out of resident memory.

    Raises:
        DiskError: The disk is full or the folder cannot be written to.

    Example:
        >>> with file_backed(Path(tempfile.gettempdir())):
        ...     model = nn.Linear(1024, 1024)
        >>> model.weight.shape
        torch.Size([1024, 1024])
    """
    with FileBacked(folder, at_least) as files:
        yield files


def skeleton(build: Callable[[], nn.Module], folder: Path | None = None, *, seed: int = 0) -> nn.Module:
    """Build a model without the values of its parameters and buffers: these may be on the meta device.

    All else is as the constructor gives it under `seeded(seed)`: names, shapes, dtypes and ties of tensors, Python attributes, and
    tensors that are neither parameters nor buffers, with their values; what layers compute with is taken from here.

    The model is built on the meta device, where values that are not needed are not drawn either. So it is built with its values in
    mapped files instead, where each draw comes in its turn, if its constructor cannot run on the meta device (it reads values), keeps
    a tensor there that is neither a parameter nor a buffer, or draws from torch's CPU generator all the same (`device="cpu"`).
    The random states of torch, numpy and Python are afterwards the same as before.

    Args:
        build: Calls the constructor.
        folder: Folder of the mapped files; the system's folder for temporary files if None.
        seed: Seed of what the constructor draws.

    Returns:
        The model, with tensors on the meta device or in mapped files.

    Raises:
        DiskError: The model had to be built in files, and the disk is full.

    Example:
        >>> skeleton(lambda: nn.Linear(10**6, 10**6)).weight.device
        device(type='meta')
    """
    with seeded(seed):
        model = _on_meta(build)
    if model is None:
        with seeded(seed), file_backed(folder or Path(tempfile.gettempdir())):
            model = build()
    return model


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module | None:
    """Build the model on the meta device; return None if it cannot be built there faithfully."""
    try:
        # Weights that a constructor loads are copied to nowhere here, of which torch warns for each tensor.
        with _META, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build()
    # Any constructor may fail in any way on tensors without values; building in files then shows what is really wrong.
    except Exception:
        return None
    if _has_drawn():
        return None
    registered = list(model.parameters()) + list(model.buffers())
    if any(not tensor.is_meta for tensor in registered) or _has_plain_tensor(model, registered):
        return None
    return model


def _has_drawn() -> bool:
    """Decide whether anything came from torch's CPU generator since it was seeded, be it by the constructor itself.

    Values on the meta device are not drawn, and so what comes from it all the same is not what would have come after them.
    """
    unused = torch.Generator().manual_seed(torch.initial_seed())
    return not torch.equal(torch.get_rng_state(), unused.get_state())


def _has_plain_tensor(model: nn.Module, registered: list[Tensor]) -> bool:
    """Decide whether a module, or a container or plain object in it, holds a tensor that the model does not register."""
    seen = {id(tensor) for tensor in registered}
    registries = ("_parameters", "_buffers", "_modules")
    pending = [value for module in model.modules() for name, value in vars(module).items() if name not in registries]
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, nn.Module | type | str | bytes | int | float):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            return True
        if isinstance(value, Mapping):
            pending.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            pending.extend(value)
        elif hasattr(value, "__dict__") and not callable(value):
            pending.extend(vars(value).values())
    return False


class FileBacked(DispatchMode):
    """Dispatch mode under which operations that make a large CPU tensor return one that lives in a file.

    The mode works at the dispatcher, and not at the Python functions: there `copy.deepcopy` of a module (as `nn.TransformerEncoder`
    does) is seen too, and an operator's schema says whether its result is new or a view.
    """

    def __init__(self, folder: Path, at_least: int) -> None:
        super().__init__()
        self._folder = folder
        self._at_least = at_least
        # Mapped files, by the address of their first byte.
        self._maps: dict[int, mmap.mmap] = {}

    def evict(self, tensor: Tensor) -> None:
        """Take a tensor's pages out of resident memory; the values stay in its file, and come back when they are read.

        Args:
            tensor: Any tensor; one that has no file is left alone.
        """
        start = _storage_start(tensor)
        if start in self._maps:
            self._maps[start].madvise(mmap.MADV_DONTNEED)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        fill = _FILLS.get(func.overloadpacket)
        if fill is not None and "out" not in kwargs:
            template = _result_on_meta(func, args, kwargs)
            if template is not None and self._is_large(template):
                out = self.map_like(template)
                fill(out, args, kwargs)
                self.evict(out)
                return out
        result = func(*args, **kwargs)
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            self.evict(args[0])  # an initialiser has filled it, and goes on to the next tensor
        returns = func._schema.returns
        if len(returns) == 1 and returns[0].alias_info is None and self._should_move(result, args):
            return self.map_like(result).copy_(result)
        return result

    def _is_large(self, tensor: Tensor) -> bool:
        return tensor.nbytes >= max(self._at_least, 1)

    def _should_move(self, result: object, args: tuple[Any, ...]) -> bool:
        """Decide whether a result is a large new tensor in private memory."""
        if type(result) is not Tensor or result.device.type != "cpu" or result.layout != torch.strided:
            return False
        if not self._is_large(result) or not _is_dense(result):
            return False
        start = result.untyped_storage().data_ptr()
        return not any(isinstance(arg, Tensor) and _storage_start(arg) == start for arg in args)

    def map_like(self, template: Tensor) -> Tensor:
        """Make a tensor in a new file.

        Args:
            template: tensor whose size, strides and dtype it gets.

        Raises:
            DiskError: the disk is full or the folder cannot be written to.
        """
        # A view of a larger tensor has gaps, which its backward may ask for as they are.
        last = sum((length - 1) * stride for length, stride in zip(template.shape, template.stride(), strict=True))
        size = template.itemsize * (last + 1) if template.numel() else 0
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                # Reserved now: a page of a sparse file that finds the disk full later is a SIGBUS, not an error.
                os.posix_fallocate(file.fileno(), 0, size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise _disk_error(self._folder, size, error) from error
        tensor = torch.frombuffer(mapped, dtype=template.dtype).as_strided(template.shape, template.stride())
        self._maps[tensor.untyped_storage().data_ptr()] = mapped
        return tensor


def _result_on_meta(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor that an operation of `_FILLS` would make, on the meta device; None if it would not be a plain CPU tensor."""
    source = next((arg for arg in args if isinstance(arg, Tensor)), None)
    device = kwargs.get("device") or (source.device if source is not None else torch.device("cpu"))
    if torch.device(device).type != "cpu" or kwargs.get("layout") not in (None, torch.strided) or kwargs.get("pin_memory"):
        return None
    if source is not None and (source.layout != torch.strided or type(source) not in (Tensor, nn.Parameter)):
        return None
    if func.overloadpacket is _aten.clone:
        meta = source.to(_META) if source is not None else None
        result = func(meta, **kwargs)
    else:
        settings = {name: value for name, value in kwargs.items() if name not in ("generator", "pin_memory", "names")}
        if "generator" in kwargs:
            settings["generator"] = None
        result = func(*args, **{**settings, "device": _META})
    return result if _is_dense(result) else None


def _is_dense(tensor: Tensor) -> bool:
    """Decide whether the elements fill one range of memory, each at an address of its own."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda axis: axis[1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return math.prod(tensor.shape) > 0


def _storage_start(tensor: Tensor) -> int | None:
    return tensor.untyped_storage().data_ptr() if tensor.device.type == "cpu" and tensor.layout == torch.strided else None


def _disk_error(folder: Path, size: int, error: OSError) -> DiskError:
    """Make the error to raise when a file for a tensor could not be made."""
    need = f"a tensor of {format_bytes(size)} needs a file in {folder} while the model is built"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = format_bytes(shutil.disk_usage(folder).free)
        return DiskError(f"{need}, and {free} are free there; free some space or use a folder on a larger disk")
    return DiskError(f"{need}, and that failed with {error.strerror or error}; use a folder that can be written to")
