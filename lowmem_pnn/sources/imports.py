"""Import of a user's factory functions (from a module or a file) and of torchvision, with errors that say what to do."""

import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from lowmem_pnn.errors import ConfigError

_PAIR = "pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cpu"
# Names of modules that are read from a file.
_FILE_PREFIX = "_lowmem_pnn_file_"


def load_factory(spec: str) -> Callable[..., Any]:
    """Import the callable that `package.module:factory` or `path/to/file.py:factory` names.

    Neighbours of the file (or the working directory, for a module) can be imported while the file is read and while the factory
    runs; `sys.path` is afterwards what it was. A file is read once for each state of it on disk.

    Args:
        spec: A module or a path that ends in `.py`, a colon, and a name in it.

    Returns:
        The callable, with its own signature and name.

    Raises:
        ConfigError: There is no such file, module or name; the import failed; or the name is not callable.

    Example:
        >>> load_factory("collections:Counter")("aab")
        Counter({'a': 2, 'b': 1})
    """
    location, _, name = spec.rpartition(":")
    if not location or not name.isidentifier():
        raise ConfigError(f"{spec!r} names no factory; write package.module:factory or path/to/file.py:factory")
    if location.endswith(".py"):
        path = Path(location).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"{spec!r}: there is no file {path}; give the path of a Python file that defines {name}")
        folder, load = path.parent, functools.partial(_import_file, path)
    else:
        folder, load = Path.cwd(), functools.partial(importlib.import_module, location)
    with _importable(folder):
        try:
            module = load()
        # Whatever a user's file raises at import is the user's to see, on one line, with the original as the cause; that is also
        # true of a script that ends the process.
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"{spec!r}: importing {location} failed with {one_line(error)}; see that `python` imports it"
            ) from error
    factory = getattr(module, name, None)
    if factory is None:
        raise ConfigError(f"{spec!r}: {location} defines no {name!r}{did_you_mean(name, _public_callables(module))}")
    if not callable(factory):
        raise ConfigError(
            f"{spec!r}: {name} has type {type(factory).__name__}, it is not a function; give the name of a function or class"
        )

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _importable(folder):
            try:
                return factory(*args, **kwargs)
            except SystemExit as error:
                raise ConfigError(f"{spec!r} ended the process with {one_line(error)}; let it return or raise") from error

    return call


def import_torchvision(submodule: str) -> ModuleType:
    """Import a part of torchvision, which is slow to import and may be missing or broken where it is not needed.

    Args:
        submodule: Name of the part, such as `models`.

    Returns:
        The module.

    Raises:
        ConfigError: Torchvision is not installed, or was built for another torch.
    """
    try:
        return importlib.import_module(f"torchvision.{submodule}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != "torchvision":
            raise ConfigError(
                f"torchvision needs {error.name!r}, which is not installed; run: pip install {error.name}"
            ) from error
        raise ConfigError("torchvision is not installed; run: pip install torchvision, or give a file.py:factory") from error
    # A second try finds a half-imported package, whose fault is an AttributeError.
    except (ImportError, RuntimeError, AttributeError) as error:
        versions = " and ".join(f"{package} {_version(package)}" for package in ("torch", "torchvision"))
        raise ConfigError(
            f"{versions} do not match: importing torchvision failed with {one_line(error)}; install a pair that was built "
            f"together: {_PAIR} (for CUDA take its index; on a Jetson both wheels from NVIDIA's index)"
        ) from error


def did_you_mean(word: str, known: list[str]) -> str:
    """Return the end of a message about an unknown word: the nearest known words, or a few of them.

    Args:
        word: The word as the user wrote it.
        known: Words that would have been accepted.

    Returns:
        A text that starts with `; ` or is empty.

    Example:
        >>> did_you_mean("resnet-18", ["resnet18", "vgg11"])
        "; did you mean 'resnet18'?"
    """
    close = difflib.get_close_matches(word.lower(), known, n=3)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; there are: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}" if known else ""


def listed(names: Sequence[str], most: int) -> str:
    """Return the first of some names, and how many there are beside them, for a message.

    Args:
        names: The names.
        most: Most names that are told.

    Example:
        >>> listed(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def one_line(error: BaseException) -> str:
    r"""Return an exception as `Type: first line of its text`.

    Args:
        error: Any exception.

    Returns:
        One line of at most about 200 characters.

    Example:
        >>> one_line(ValueError("no such depth\nmore"))
        'ValueError: no such depth'
    """
    lines = str(error).strip().splitlines()
    first = lines[0].rstrip(".") if lines else ""
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Put a folder first in `sys.path`, and take it out again at the end."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        # By value: the imported code may itself have changed the list.
        if entry in sys.path:
            sys.path.remove(entry)


def _import_file(path: Path) -> ModuleType:
    """Run a Python file as a module under a name that no package can have, once for each state of the file."""
    status = path.stat()
    stamp = hashlib.sha256(f"{path} {status.st_mtime_ns} {status.st_size}".encode()).hexdigest()[:16]
    name = f"{_FILE_PREFIX}{stamp}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # Before the module runs: dataclasses and pickling look their module up.
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def imported_files() -> dict[str, str]:
    """Return the paths of the files that were read as modules, by the modules' names."""
    return {name: str(module.__file__) for name, module in list(sys.modules.items()) if name.startswith(_FILE_PREFIX)}


def import_again(name: str, path: Path) -> None:
    """Read a file as a module in a process that another one, which has read it, has started; its neighbours stay importable.

    Args:
        name: Name of the module there.
        path: Path of the file.

    Raises:
        ConfigError: The file was changed meanwhile.
    """
    if name in sys.modules:
        return
    sys.path.insert(0, str(path.parent))
    if _import_file(path).__name__ != name:
        raise ConfigError(f"{path} was changed since the run was started; start it again")


def _public_callables(module: ModuleType) -> list[str]:
    """Return the names of callables that a module itself defines."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    ]


def _version(package: str) -> str:
    """Return the installed version of a package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"
