"""Data sets by name: bundled, downloaded by torchvision, from a file or a folder, or from a user's factory function."""

import contextlib
import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowmem_pnn.errors import ConfigError, DataError, LowMemError
from lowmem_pnn.sources.arrays import as_labels, as_tensor
from lowmem_pnn.sources.dataset import Dataset, folder_name, join_parts, options_like
from lowmem_pnn.sources.given import returned_parts
from lowmem_pnn.sources.image_folder import open_image_folder
from lowmem_pnn.sources.imports import did_you_mean, import_torchvision, load_factory, one_line
from lowmem_pnn.sources.map_split import from_arrays, from_torch
from lowmem_pnn.sources.npz_file import read_members
from lowmem_pnn.sources.preprocessing import InputForm
from lowmem_pnn.sources.resize import Resize
from lowmem_pnn.sources.splits import ArraySplit, SampleSplit
from lowmem_pnn.sources.targets import PYTORCH_IGNORED, TargetOptions, Targets
from lowmem_pnn.sources.text import DEFAULT_CONTEXT, NUM_TOKENS, open_text

# name -> (class in torchvision.datasets, its arguments)
_TORCHVISION: dict[str, tuple[str, dict[str, str]]] = {
    "mnist": ("MNIST", {}),
    "fashion-mnist": ("FashionMNIST", {}),
    "emnist-balanced": ("EMNIST", {"split": "balanced"}),
    "cifar10": ("CIFAR10", {}),
    "cifar100": ("CIFAR100", {}),
}
_KEYS = ("x_train", "y_train", "x_test", "y_test")
_NPZ_PARTS = (("train", "training"), ("test", "test"), ("val", "validation"))
_FORMS = (
    "npz:FILE, imagefolder:DIR, segmentation:DIR, csv:FILE, parquet:FILE, hfdata:DIR, text:FILE, jsonl:FILE, tokens:FILE, "
    "package.module:factory or file.py:factory"
)


def find_dataset(
    spec: str,
    root: Path,
    input_form: InputForm,
    *,
    context: int | None = None,
    whole_text: bool = False,
    skip_broken: bool = False,
    options: TargetOptions = TargetOptions(),  # noqa: B008 - it is frozen
    resize: Resize | None = None,
) -> Dataset:
    """Open the data set that a text names; tables, masks, Hugging Face's data and text by a tokenizer have been opened before it is asked.

    Args:
        spec: Name of a data set: `digits`, `mnist`, `fashion-mnist`, `emnist-balanced`, `cifar10`, `cifar100`, `npz:FILE` (arrays
            x_train, y_train and, for a test, x_test, y_test, to validate on x_val, y_val; or x and y), `imagefolder:DIR` (folders train, val
            and test, or only class folders), `text:FILE` (its bytes are tokens), `package.module:factory` or
            `path/to/file.py:factory` (returns train, (train, test), (train, val, test), a dictionary of these, or a `Dataset`).
        root: Folder of downloaded data sets.
        input_form: Form of the samples that the model takes.
        context: Tokens of a sample of text, which is the model's context; None for 256. Only text is divided by it.
        whole_text: Leave text whole, as where its test part is given apart; else its last tenth is that.
        skip_broken: Read every sample once, and leave out those that cannot be used, instead of raising.
        options: What is known of the targets.
        resize: Brings images to one size; None to leave them as they are.

    Returns:
        The data set.

    Raises:
        ConfigError: There is no data set of that name, or its factory cannot be imported.
        DataError: The data set is missing, empty, damaged, or not of a form that the model takes.

    Example:
        >>> data = find_dataset("digits", Path("data"), "flat")
        >>> len(data.train), len(data.test), data.num_classes, data.sample_shape
        (1437, 360, 10, (64,))
    """
    if spec in ("npz:", "imagefolder:", "text:", "npz", "imagefolder", "text"):
        raise ConfigError(f"data set {spec!r} says no place; others than the named ones are given as {_FORMS}")
    if spec.startswith("npz:"):
        return _npz(Path(spec.removeprefix("npz:")).expanduser(), input_form, skip_broken, options, resize)
    if spec.startswith("imagefolder:"):
        return open_image_folder(Path(spec.removeprefix("imagefolder:")).expanduser(), input_form, skip_broken, resize)
    if spec.startswith("text:"):
        if resize is not None:
            raise ConfigError(f"--image-size has no effect here: data {spec!r} is text; leave it out")
        path = Path(spec.removeprefix("text:")).expanduser()
        return _text(path, input_form, DEFAULT_CONTEXT if context is None else context, whole_text)
    if spec == "digits":
        return _digits(input_form, resize)
    if spec in _TORCHVISION:
        return _torchvision(spec, root, input_form, resize)
    if ":" in spec:
        return _factory(spec, input_form, skip_broken, options, resize)
    for suffix, form in (
        (".npz", "npz"),
        (".txt", "text"),
        (".jsonl", "jsonl"),
        (".bin", "tokens"),
        (".csv", "csv"),
        (".parquet", "parquet"),
    ):
        if Path(spec).suffix == suffix:
            there = "is a file" if Path(spec).is_file() else "looks like a file, which is not there"
            raise ConfigError(f"data set {spec!r} {there}; write {form}:{spec}")
    if Path(spec).is_dir():
        raise ConfigError(
            f"data set {spec!r} is a folder; write imagefolder:{spec} for images in a folder for each class, or text:{spec}"
        )
    if "/" in spec:
        raise ConfigError(
            f"there is no folder or file {spec!r}; data in one is given by its kind, as imagefolder:{spec} for images in a folder for each class"
        )
    raise ConfigError(
        f"there is no data set {spec!r}{did_you_mean(spec, ['digits', *_TORCHVISION])}; others are given as {_FORMS}"
    )


def make_dataset(
    train: Any,
    test: Any = None,
    *,
    val: Any = None,
    name: str,
    input_form: InputForm = "any",
    num_classes: int | None = None,
    skip_broken: bool = False,
    options: TargetOptions = TargetOptions(),  # noqa: B008 - it is frozen
    resize: Resize | None = None,
) -> Dataset:
    """Make a data set of PyTorch data sets or tensors.

    Args:
        train: Map-style data set of (x, target), or a pair of tensors, arrays, tables or lists (x, y). What targets may be says
            `lowmem_pnn.sources.targets`.
        test: Test part, as `train`; None if there is none.
        val: Validation part, as `train`; None if there is none.
        name: Name of the data set.
        input_form: Form of the samples that the model takes.
        num_classes: Number of classes; None to count the classes that labels, and tokens that have labels, show in all parts.
        skip_broken: Read every sample once, and leave out those that raise, hold NaN or infinity, or are of another form than most.
        options: What is known of the targets.
        resize: Brings images to one size; None to leave them as they are.

    Returns:
        The data set.

    Raises:
        DataError: A part is empty or not usable, or the parts do not fit together.

    Example:
        >>> data = make_dataset((torch.zeros(6, 4), torch.arange(6)), name="zeros")
        >>> data.num_classes, data.preprocessing
        (6, 'float32 as it is')
    """

    def part(data: Any, kind: str, known: TargetOptions) -> SampleSplit:
        return from_torch(
            data,
            num_classes=num_classes,
            input_form=input_form,
            where=f"{name} ({kind} part)",
            skip_broken=skip_broken,
            options=known,
            resize=resize,
        )

    train_split = part(train, "training", options)
    known = options_like(train_split.targets, options)
    test_split, val_split = (
        None if data is None else part(data, kind, known) for data, kind in ((test, "test"), (val, "validation"))
    )
    return join_parts(name, train_split, test_split, val_split)


def _digits(input_form: InputForm, resize: Resize | None) -> Dataset:
    """Open scikit-learn's 1,797 digits of 8x8; every fifth of each class, in a shuffled order, is for the test."""
    images, labels = _load_digits()
    # RandomState's stream is frozen for good: the split must be the same everywhere.
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[by_class[::5]] = True
    x = torch.from_numpy(images.astype(np.float32) / 16).reshape(-1, 1, 8, 8)
    y = as_labels(labels, "digits")

    def part(chosen: Tensor, where: str) -> ArraySplit:
        return ArraySplit(x[chosen], y[chosen], Targets("class", 10, ignored=PYTORCH_IGNORED), input_form, where, resize)

    test = torch.from_numpy(is_test)
    parts = part(~test, "digits (training part)"), part(test, "digits (test part)")
    return join_parts("digits", *parts, first_steps=("values / 16",), classes=tuple("0123456789"))


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the digits [1797, 64] (values of 0 to 16) and their labels [1797] from scikit-learn's installation.

    Its file is read without it where it lies as it always did, for to import scikit-learn takes nearly two seconds.
    """
    found = importlib.util.find_spec("sklearn")
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz" if found and found.origin else None
    if file is not None and file.is_file():
        table = np.loadtxt(file, delimiter=",")
        return table[:, :-1], table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images, labels


def _torchvision(spec: str, root: Path, input_form: InputForm, resize: Resize | None) -> Dataset:
    """Open a data set that torchvision downloads; it is in memory as bytes."""
    class_name, settings = _TORCHVISION[spec]
    make: Callable[..., Any] = getattr(import_torchvision("datasets"), class_name)
    first_steps = ("uint8 / 255",) if spec != "emnist-balanced" else ("made upright", "uint8 / 255")
    parts: list[ArraySplit] = []
    for train in (True, False):
        data, targets, classes = _load_torchvision(
            spec, root, functools.partial(make, root=root, train=train, download=True, **settings)
        )
        images = as_tensor(data, spec)
        if spec == "emnist-balanced":
            # EMNIST's files hold every image transposed.
            images = images.transpose(1, 2).contiguous()
        where = f"{spec} ({'training' if train else 'test'} part)"
        labels = as_labels(targets, where)
        parts.append(from_arrays(images, labels, num_classes=None, input_form=input_form, where=where, resize=resize))
    return join_parts(spec, parts[0], parts[1], first_steps=first_steps, classes=classes)


def _load_torchvision(spec: str, root: Path, make: Callable[[], Any]) -> tuple[Any, Any, tuple[str, ...]]:
    """Return images, labels and names of classes of one part; the text that torchvision prints goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            # CIFAR's pickles are older than numpy's present rules.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            dataset = make()
            return dataset.data, dataset.targets, tuple(map(str, getattr(dataset, "classes", ())))
    except MemoryError:
        raise
    # Torchvision raises nearly anything for a failed download and for a file that a broken download left: URLError, EOFError,
    # BadZipFile, zlib.error, AssertionError, TypeError, and others.
    except Exception as error:
        raise DataError(
            f"data set {spec!r} is not usable in {root.absolute()} and could not be downloaded: {one_line(error)}; "
            "put torchvision's files there (remove broken ones), or give a file of arrays: npz:FILE"
        ) from error


def _npz(path: Path, input_form: InputForm, skip_broken: bool, options: TargetOptions, resize: Resize | None) -> Dataset:
    """Open the arrays of a .npz file, as Keras names them; where it holds x and y, these are all there is to train on."""
    arrays = read_npz(path, (*_KEYS, "x_val", "y_val", "x", "y"))
    keys = {name: (f"x_{name}", f"y_{name}") for name, _ in _NPZ_PARTS}
    if {"x", "y"} <= set(arrays) and not {"x_train", "y_train"} & set(arrays):
        keys["train"] = ("x", "y")
    present = [name for name, _ in _NPZ_PARTS if name == "train" or {*keys[name]} & set(arrays)]
    missing = [key for name in present for key in keys[name] if key not in arrays]
    if missing:
        content = ", ".join(sorted(arrays)) or "nothing"
        raise DataError(
            f"{path} lacks {', '.join(missing)}; it holds {content}; save {', '.join(_KEYS)}, or x and y, with numpy.savez"
        )

    def part(name: str, kind: str, known: TargetOptions) -> ArraySplit:
        x_key, y_key = keys[name]
        x, y = as_tensor(arrays[x_key], f"{path}: {x_key}"), arrays[y_key]
        if x.ndim < 1 or y.ndim < 1:
            raise DataError(f"{path}: {x_key} has shape {tuple(x.shape)} and {y_key} {y.shape}; give (N, ...) and (N,)")
        where = f"{path} ({kind} part)"
        split = from_arrays(
            x,
            y,
            num_classes=None,
            input_form=input_form,
            where=where,
            options=known,
            labels_name=f"{path}: {y_key}",
            resize=resize,
        )
        wrong = split.y[(split.y < 0) & (split.y != split.targets.ignored)] if split.targets.kind == "class" else split.y[:0]
        if len(wrong):
            raise DataError(f"{path}: {y_key} holds the label {int(wrong.min())}; number the classes from 0")
        return split

    splits = {"train": part("train", "training", options)}
    known = options_like(splits["train"].targets, options)
    splits |= {name: part(name, kind, known) for name, kind in _NPZ_PARTS[1:] if name in present}
    for split in splits.values() if skip_broken else ():
        split.skip_broken()
    return join_parts(path.stem, splits["train"], splits.get("test"), splits.get("val"))


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Read arrays of a .npz file, which are mapped where they are large and stored as they are.

    Args:
        path: Path of the file.
        names: Names of the arrays that are wanted; others are there as None.

    Raises:
        DataError: There is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path.absolute()}; give npz:FILE with arrays {', '.join(_KEYS)}")
    try:
        return read_members(path, names)
    except (LowMemError, MemoryError):
        raise
    # Numpy and zipfile raise nearly anything for files that are damaged, of another kind, or hold pickled objects: OSError, EOFError,
    # ValueError, KeyError, NotImplementedError, RuntimeError, BadZipFile, zlib.error, struct.error, and others.
    except Exception as error:
        raise DataError(f"{path} cannot be read as .npz: {one_line(error)}; save arrays of numbers with numpy.savez") from error


def _text(path: Path, input_form: InputForm, context: int, whole: bool) -> Dataset:
    """Open the bytes of a file as tokens."""
    if input_form != "any":
        raise ConfigError(
            f"data set 'text:{path}' holds tokens, and the model takes {'images' if input_form == 'image3' else 'flat vectors'}; give a "
            f"model of tokens, such as --model gpt:layers=2,width=64,heads=2,context={context}"
        )
    text = open_text(path, context, whole=whole)
    return Dataset(
        name=folder_name(path.stem),
        train=text.train,
        test=text.test,
        targets=Targets("tokens", NUM_TOKENS, (context,), ignored=PYTORCH_IGNORED),
        sample_shape=(context,),
        dtype=torch.int64,
        preprocessing=text.preprocessing,
        fingerprint=text.fingerprint,
    )


def _factory(spec: str, input_form: InputForm, skip_broken: bool, options: TargetOptions, resize: Resize | None) -> Dataset:
    """Open the data sets that a user's function returns."""
    factory = load_factory(spec)
    try:
        result = factory()
    except (LowMemError, MemoryError):
        raise
    # Whatever a user's function raises is the user's to see, on one line, with the original as the cause.
    except Exception as error:
        raise DataError(f"data set {spec!r} cannot be opened: {one_line(error)}; see to the function") from error
    if isinstance(result, Dataset):
        if skip_broken:
            raise ConfigError(
                f"--skip-broken has no effect here: {spec!r} returns a Dataset that is made already; leave it out, and give "
                "skip_broken=True to make_dataset"
            )
        if resize is not None:
            raise ConfigError(
                f"--image-size has no effect here: {spec!r} returns a Dataset that is made already; leave it out, and resize its images"
            )
        return result
    location, _, name = spec.rpartition(":")
    label = f"{Path(location).stem if location.endswith('.py') else location}-{name}"
    parts = returned_parts(result) or {"train": result}
    if parts.get("train") is None:
        raise DataError(
            f"data set {spec!r}: {name}() returned no data; return train, (train, test), (train, val, test), a dictionary of these, or a "
            "lowmem_pnn Dataset"
        )
    return make_dataset(
        parts["train"],
        parts.get("test"),
        val=parts.get("val"),
        name=label,
        input_form=input_form,
        skip_broken=skip_broken,
        options=options,
        resize=resize,
    )
