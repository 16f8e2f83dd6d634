"""Conversion of users' arrays, images and numbers to tensors and labels, with checks of labels and values; and hashes of tensors."""

import warnings
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lowmem_pnn.errors import DataError
from lowmem_pnn.sources.imports import listed

FEW_OPERATIONS = (torch.uint16, torch.uint32, torch.uint64)
"""Element types for which torch has no comparisons and no maximum."""

_WHOLE_HASH_BYTES = 64 * 10**6
_PIECE_BYTES = 1 << 20
# By how much probabilities may miss 1, since they are rounded.
_ROUNDING = 1e-3


class _Digest(Protocol):
    def update(self, data: Any, /) -> None: ...


def as_tensor(value: Any, where: str, *, palette: bool = False) -> Tensor:
    """View a value as a CPU tensor, without a copy where that is possible.

    Args:
        value: A tensor, an array, a table with `to_numpy` (as pandas has), a list of these or of numbers, a number, or a PIL image.
        where: Name of the value in messages.
        palette: Whether an image may hold places in a palette, as masks do.

    Returns:
        A tensor that may share memory with `value`: not to be written to.

    Raises:
        DataError: The value is none of these, or holds no real numbers.
    """
    if isinstance(value, Tensor):
        if value.is_nested:
            raise DataError(
                f"{where} holds a nested tensor; make it dense with torch.nested.to_padded_tensor(), or give a list of tensors"
            )
        if value.layout != torch.strided:
            raise DataError(f"{where} holds a sparse tensor; make it dense with to_dense()")
        return value.detach().cpu()
    if hasattr(value, "toarray"):
        raise DataError(f"{where} holds a sparse {type(value).__name__}; make it dense with toarray()")
    images = value if isinstance(value, list | tuple) and len(value) and hasattr(value[0], "getpalette") else (value,)
    mode = next(
        (one for image in images if (one := getattr(image, "mode", None)) in ("P", "PA") and hasattr(image, "getpalette")), None
    )
    if mode is not None and not palette:
        raise DataError(
            f"{where} holds an image of mode {mode}, whose values are places in a palette and no colours; give image.convert('RGB')"
        )
    if isinstance(value, list | tuple | range) or hasattr(value, "to_numpy"):
        value = _as_array(value, where)
    # PIL images have the first of these, other libraries' arrays the second; to ask for it spares importing PIL here.
    if not isinstance(value, int | float) and not any(hasattr(value, name) for name in ("__array_interface__", "__array__")):
        raise DataError(f"{where} holds a {type(value).__name__}; give tensors, arrays or images")
    if np.ma.is_masked(value):
        raise DataError(
            f"{where} holds a masked array with masked values, which would be learnt as any others; fill them, with filled()"
        )
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where} holds values of dtype {array.dtype}; give real numbers")
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides) or array.dtype.itemsize > 8:
        array = np.ascontiguousarray(array, dtype=np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        # Read-only arrays stay unchanged: nothing here writes to a data set.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _as_array(value: Any, where: str) -> Any:
    """Return a list or a table as an array, where its values are numbers.

    Raises:
        DataError: They are not, or rows differ in length.
    """
    try:
        if isinstance(value, list | tuple | range):
            tensors = [item for item in value if isinstance(item, Tensor)]
            array = np.asarray(torch.stack(tensors).cpu() if value and len(tensors) == len(value) else value)
        else:
            array = np.asarray(value.to_numpy())
    # Of numpy and torch, for rows of different lengths.
    except (ValueError, RuntimeError, TypeError) as error:
        raise DataError(f"{where}: a {type(value).__name__} has rows that differ in shape; give all samples one shape") from error
    if array.dtype != object:
        return array
    # A table with columns of several types gives objects.
    if all(isinstance(item, bool | int | float | np.number | np.bool_) for item in array.flat):
        return array.astype(np.float64)
    place, wrong = next(
        (index, item) for index, item in np.ndenumerate(array) if not isinstance(item, bool | int | float | np.number | np.bool_)
    )
    columns = getattr(value, "columns", None)
    if columns is None or len(place) < 2:
        return array  # refused, or taken for words, by whoever asked
    raise DataError(
        f"{where}: column {str(columns[place[1]])!r} holds {wrong!r} ({type(wrong).__name__}); give numbers alone, or leave the column out"
    )


def refuse_words(labels: Any, where: str) -> None:
    """Refuse labels that are words: training and test data, numbered apart, might get different numbers.

    Args:
        labels: Labels of any form.
        where: Name of the data in messages.

    Raises:
        DataError: They are words.
    """
    if isinstance(labels, list | tuple | range) or hasattr(labels, "to_numpy"):
        labels = _as_array(labels, f"the labels of {where}")
    if isinstance(labels, str | bytes):
        raise DataError(
            f"the labels of {where} hold a {type(labels).__name__} ({labels!r}); give class numbers from 0, such as "
            f"names.index({labels!r}) of a sorted list of all names"
        )
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "USO":
        return
    words = sorted({str(word) for word in labels.flat if isinstance(word, str | bytes)})
    if words:
        raise DataError(
            f"{where}: labels are words ({listed([*map(repr, words)], 5)}); give class numbers, the same for training and test: "
            "y = np.unique(names, return_inverse=True)[1] of all names together"
        )


def as_labels(value: Any, where: str) -> Tensor:
    """Convert class numbers to int64.

    Args:
        value: Class numbers (), (N,) or (N, 1): integers, or floats without fractions, as a tensor, an array, a list or a number.
        where: Name of the data in messages.

    Returns:
        Labels () or (N,); int64.

    Raises:
        DataError: The values are not class numbers.

    Example:
        >>> as_labels(np.array([[3.0], [1.0]]), "y_train")
        tensor([3, 1])
    """
    if isinstance(value, list | tuple | range) or hasattr(value, "to_numpy"):
        value = _as_array(value, f"the labels of {where}")
    refuse_words(value, where)
    labels = as_tensor(value, f"the labels of {where}")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim > 1:
        raise DataError(
            f"{where}: labels have shape {tuple(labels.shape)}; give one class number for each sample (one-hot: argmax), or, for "
            "a model of tokens, integer samples and labels of one shape (N, T)"
        )
    if labels.dtype.is_floating_point:
        fractions = labels[labels != labels.trunc()]
        if fractions.numel():
            raise DataError(f"{where}: a label is {fractions.flatten()[0].item():g}; labels are class numbers, whole and from 0")
    return labels.to(torch.int64)


def count_classes(x: Tensor, y: Tensor, ignored: int | None = None) -> int:
    """Return the number of classes that labels show, and tokens too where each token has a label.

    Args:
        x: Samples (N, ...).
        y: Labels (N,), or of x's shape; int64; at least one.
        ignored: Label that is left out.

    Example:
        >>> count_classes(torch.tensor([[7, 1]]), torch.tensor([[1, 2]])), count_classes(torch.tensor([[7, 1]]), torch.tensor([2]))
        (8, 3)
    """
    # By numpy: torch has no maximum of uint16, in which tokens are often kept.
    labels = y.cpu().numpy()
    counted = labels if ignored is None or ignored < 0 else labels[labels != ignored]
    tokens = [int(x.cpu().numpy().max())] if y.ndim > 1 else []
    return max(0, *tokens, int(counted.max()) if counted.size else 0) + 1


def zeros_and_ones(y: Tensor) -> Tensor:
    """Return which of some targets are 0 and 1 alone.

    Args:
        y: Targets (N, ...).

    Returns:
        Truth values (N,).
    """
    return ((y == 0) | (y == 1)).reshape(len(y), -1).all(1)


def probabilities(y: Tensor) -> Tensor:
    """Return which of some targets are probabilities, which sum to 1.

    Args:
        y: Targets (N, classes).

    Returns:
        Truth values (N,).
    """
    return ((y >= 0) & (y <= 1)).all(-1) & ((y.to(torch.float64).sum(-1) - 1).abs() < _ROUNDING)


def check_values(y: Tensor, kind: str, where: str, *, batched: bool, remedy: str) -> None:
    """Refuse targets that are not of their kind: where they come one by one, a few of them have shown which it is.

    Args:
        y: Targets (N, ...), float32.
        kind: `labels`, `probabilities` or `values`.
        where: Name of the data in messages; of the sample where there is one.
        batched: Whether they are of many samples.
        remedy: What leaves a broken sample out, in brackets.

    Raises:
        DataError: One is not.
    """
    fits = {"labels": zeros_and_ones, "probabilities": probabilities}
    fit = fits[kind](y) if kind in fits else torch.isfinite(y).reshape(len(y), -1).all(1)
    if bool(fit.all()):
        return
    number = int((~fit).nonzero()[0])
    which = f"the target of sample {number}" if batched else "its target"
    if kind == "values":
        raise DataError(f"{where}: {which} is NaN or infinite; repair it or leave the sample out{remedy}")
    row = y[number]
    wrong = row[~((row == 0) | (row == 1))] if kind == "labels" else row[~((row >= 0) & (row <= 1))]
    holds = f"holds {wrong[0].item():g}" if wrong.numel() else f"sums to {row.sum().item():g}"
    others = "0 and 1 alone" if kind == "labels" else "probabilities, which sum to 1"
    raise DataError(
        f"{where}: {which} {holds}, and others are {others}; mend it, or give --task regression where targets are numbers"
    )


def fits_bytes(numbers: Tensor) -> bool:
    """Return whether whole numbers, at least one, are all from 0 to 255.

    Args:
        numbers: The numbers, of any shape.

    Example:
        >>> fits_bytes(torch.tensor([0, 255])), fits_bytes(torch.tensor([0, 256])), fits_bytes(torch.tensor([-1]))
        (True, False, False)
    """
    return numbers.dtype in (torch.uint8, torch.bool) or (int(numbers.min()) >= 0 and int(numbers.max()) < 256)


def hash_tensor(digest: _Digest, tensor: Tensor) -> None:
    """Add a tensor's shape, dtype and values to a hash.

    Of a tensor beyond 64 MB, 64 pieces of 1 MiB, evenly spaced, and the sum of all words are added: any single change is seen, in the
    time of one pass over the memory.

    Args:
        digest: Hash object of hashlib.
        tensor: Tensor on the CPU.
    """
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    if not tensor.numel():
        return
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    if data.nbytes <= _WHOLE_HASH_BYTES:
        digest.update(data)
        return
    for start in np.linspace(0, data.nbytes - _PIECE_BYTES, 64).astype(np.int64):
        digest.update(data[start : start + _PIECE_BYTES])
    whole_words = data.nbytes // 8 * 8
    digest.update(str(int(data[:whole_words].view(np.uint64).sum(dtype=np.uint64))).encode())
    digest.update(data[whole_words:])
