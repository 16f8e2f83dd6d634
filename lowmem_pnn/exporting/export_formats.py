"""Export formats: a trained model as weights alone, as a `torch.export` program, or as ONNX; each read again, and compared."""

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lowmem_pnn.config.faults import suggest
from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.evaluation.exits import SeveralTensorsModel
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.units import format_bytes

FileFormat = Literal["safetensors", "pt2", "onnx"]
"""Formats that are one file."""

ExportFormat = Literal["safetensors", "pt2", "onnx", "hf"]
"""What `--to` takes."""

FILE_OF: dict[FileFormat, str] = {"safetensors": "model.safetensors", "pt2": "model.pt2", "onnx": "model.onnx"}
"""Name of the file of each format."""

# The model, and what is read again to be compared; ONNX is put together in memory too.
_COPIES: dict[FileFormat, int] = {"pt2": 2, "onnx": 3}
# A file of ONNX is one message of protobuf.
_MOST_ONNX_BYTES = 2**31 - 2**20
_SAMPLES = 3


def check_name(to: str | None) -> None:
    """Refuse a format that there is not.

    Args:
        to: its name; None for none.

    Raises:
        ConfigError: there is no such format.
    """
    known = get_args(ExportFormat)
    if to is not None and to not in known:
        raise ConfigError(f"--to {to!r} is none of {', '.join(known)}{suggest(to, list(known))}")


def check_format(to: FileFormat | None, weight_bytes: int, budget_bytes: int) -> None:
    """Refuse a format that cannot be written here, before anything is built for it.

    Args:
        to: the format; None for a program and its weights.
        weight_bytes: bytes of the model's weights and buffers.
        budget_bytes: memory budget of the run.

    Raises:
        BudgetError: the model would have to be in memory whole, and is too large.
        ConfigError: a package is not installed, or the format does not hold so large a model.
    """
    if to == "safetensors":
        return
    if to == "onnx":
        for package in ("onnx", "onnxscript"):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ConfigError(
                    f"--to onnx needs {package}, which is not installed; run: pip install 'lowmem-pnn[onnx]'"
                ) from error
    copies = _COPIES[to or "pt2"]
    needed = copies * weight_bytes
    if needed > budget_bytes:
        what = "export without --to" if to is None else f"--to {to}"
        raise BudgetError(
            f"{what} needs the model whole in memory, {copies} times its {format_bytes(weight_bytes)} ({needed:,} bytes), above the run's "
            f"budget of {format_bytes(budget_bytes)}; give --to safetensors",
            needed,
        )
    if to == "onnx" and weight_bytes > _MOST_ONNX_BYTES:
        raise ConfigError(f"a file of ONNX holds at most 2 GiB, and the model has {format_bytes(weight_bytes)}; give --to pt2")


def make_program(model: nn.Module, inputs: Sequence[TensorSpec], what: str) -> torch.export.ExportedProgram:
    """Return a model as a program for batches of any size.

    Args:
        model: the model, in eval mode; one of several inputs takes them as `*inputs`.
        inputs: shape and type of each tensor of a sample.
        what: name of the model in messages.

    Raises:
        ConfigError: it cannot be written as a program.
    """
    examples = tuple(torch.zeros(2, *spec.shape, dtype=spec.dtype) for spec in inputs)
    shapes: Any = ({0: torch.export.Dim("batch")},) * len(examples)
    takes_any_number = isinstance(model, SeveralTensorsModel)
    with _refused(what, "a torch.export program"):
        return torch.export.export(model, examples, dynamic_shapes=(shapes,) if takes_any_number else shapes)


def save_onnx(
    program: torch.export.ExportedProgram, file: Path, what: str, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    """Write a program as ONNX, its first axis of any length.

    Args:
        program: the program.
        file: path of the new file.
        what: name of the model in messages.
        inputs: names of its inputs.
        outputs: names of its outputs.

    Raises:
        ConfigError: it cannot be written as ONNX.
    """
    with _refused(what, "ONNX"), _quiet():
        written = torch.onnx.export(program, input_names=list(inputs), output_names=list(outputs), dynamo=True, verbose=False)
        assert written is not None
        written.save(str(file), external_data=False)


def largest_difference(
    model: nn.Module, inputs: Sequence[TensorSpec], file: Path, to: FileFormat, names: Sequence[str]
) -> float | None:
    """Run a batch through a model and through the file that was written of it.

    Args:
        model: the model, in eval mode.
        inputs: shape and type of each tensor of a sample.
        file: path of the file.
        to: format of the file.
        names: names of the inputs.

    Returns:
        The largest difference between two outputs, 0 where both are no number; None where what reads the format is not installed.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [_example(spec, name, generator) for spec, name in zip(inputs, names, strict=True)]
    run = _reader(file, to, names)
    if run is None:
        return None
    with torch.no_grad():
        pairs = zip(_as_tuple(model(*tensors)), _as_tuple(run(*tensors)), strict=True)
        return max((_difference(one.double(), other.double()) for one, other in pairs if one.numel()), default=0.0)


def _example(spec: TensorSpec, name: str, generator: torch.Generator) -> Tensor:
    """Return values for an input; of integers those that are sure to be known: the first token, and masks that hide nothing."""
    shape = (_SAMPLES, *spec.shape)
    if not spec.dtype.is_floating_point and name.endswith("mask"):
        return torch.ones(shape, dtype=spec.dtype)
    return torch.rand(shape, generator=generator).to(spec.dtype)


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two tensors; the largest number where only one of them has a value that is not finite."""
    same = (one == other) | (one.isnan() & other.isnan())
    return float((one - other).abs().nan_to_num(torch.finfo(one.dtype).max).masked_fill(same, 0.0).max())


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _reader(file: Path, to: FileFormat, names: Sequence[str]) -> Callable[..., Any] | None:
    if to == "pt2":
        loaded: Callable[..., Any] = torch.export.load(file).module()
        return loaded
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return None
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    there = {one.name for one in session.get_inputs()}

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        # An input that nothing depends on may have been left out.
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True) if name in there}
        return tuple(torch.from_numpy(output) for output in session.run(None, given))

    return run


@contextlib.contextmanager
def _refused(what: str, form: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    # Whatever the exporters raise for an operation that they do not know, or a forward that decides by values.
    except Exception as error:
        if isinstance(error, OSError):
            raise
        raise ConfigError(f"{what} cannot be written as {form}: {one_line(error)[:300]}; give --to safetensors") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own reports from being printed."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
