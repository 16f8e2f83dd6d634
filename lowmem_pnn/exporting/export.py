"""Export: a trained model, up to one of its exits, as a program and weights that plain PyTorch reads."""

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowmem_pnn.adapters.merging import MergedWeights
from lowmem_pnn.errors import CheckpointError, ConfigError, DiskError
from lowmem_pnn.evaluation.exits import HEADS_FILE, ExitModel, SeveralTensorsModel, num_parameters
from lowmem_pnn.exporting.export_folder import ExportFolder, HashedFile
from lowmem_pnn.exporting.export_formats import FILE_OF, FileFormat, check_format, largest_difference, make_program, save_onnx
from lowmem_pnn.memory.aligned import byte_view
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.model.layer import is_of_head
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.stores.header import TensorLayout, describe, lay_out
from lowmem_pnn.stores.journal import DAMAGED
from lowmem_pnn.stores.keys import VERSIONS_KEY
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.workload import Workload
from lowmem_pnn.zoo.deferred_init import file_backed

_PIECE_BYTES = 1 << 22


def find_exit(result: Result, exit: str | int, path: Path) -> int | None:
    """The exit that is asked for, from 0; None for the whole model of a run without exits.

    Args:
        result: of the run.
        exit: a number from 1, or `auto`.
        path: of the run, for messages.

    Raises:
        ConfigError: there is no such exit.
    """
    count = len(result.exits)
    if str(exit) == "auto":
        if count and result.chosen_exit is None:
            raise ConfigError(
                f"{path} has no accuracies on validation data to choose an exit by; give --exit K, from 1 to {count}"
            )
        return None if result.chosen_exit is None else result.chosen_exit - 1
    if not str(exit).isdecimal() or not 1 <= int(exit) <= count:
        there = f"the run has exits 1 to {count}" if count else f"method {result.method} has no exits"
        raise ConfigError(f"--exit {exit}: {there}; give auto{', or one of these' if count else ''}")
    return int(exit) - 1


def refuse_part(result: Result, number: int | None, option: str) -> None:
    """Refuse an exit before the last where the whole model is written.

    Args:
        result: of the run.
        number: the exit, as `find_exit` returns it.
        option: what writes the whole model.

    Raises:
        ConfigError: the exit is one before the last.
    """
    count = len(result.exits)
    if number is not None and number < count - 1:
        raise ConfigError(
            f"{option} writes the whole model, and exit {number + 1} of {count} is a part of it; give --exit {count}, or leave {option} out"
        )


def export_exit(
    workload: Workload, result: Result, number: int | None, path: Path, folder: ExportFolder, to: FileFormat | None = None
) -> dict[str, Any]:
    """Write the model that ends at an exit.

    Args:
        workload: model of the run; its chain's tensors are replaced.
        result: result of the run.
        number: number of the exit, from 0; None for the whole model.
        path: folder of the run.
        folder: folder for the files.
        to: the one format that is written, and compared; None for a program and its weights.

    Returns:
        What was written, and what is known of the exit.

    Raises:
        CheckpointError: a weight is missing in the run's files, or differs from the model's.
        ConfigError: the format does not hold the model, or a package for it is not installed.
        BudgetError: the model does not fit in the budget whole, and the format needs it so.
        DiskError: the files could not be written.
    """
    chain = workload.chain
    if result.exits and len(result.exits) != len(chain.layers):
        raise CheckpointError(f"{path} has {len(result.exits)} exits, and its model {len(chain.layers)} layers; {DAMAGED}")
    last = len(chain.layers) - 1 if number is None else number
    params, known = num_parameters(chain, last), result.exits[last] if result.exits else {}
    report: dict[str, Any] = {
        "exit": last + 1 if number is not None else None,
        "layer": chain.layers[last].name,
        "params": params,
        "val_accuracy": known.get("val_accuracy", result.val_accuracy),
    }
    if to == "safetensors":
        difference: float | None = _export_weights(workload, last, path, folder)
        return {**report, "file": str(folder.path / FILE_OF[to]), "largest_difference": difference}
    whole = {chain.owner_of(name): tensor for name, tensor in _wanted(chain, last).items()}
    check_format(to, sum(tensor.nbytes for tensor in whole.values()), workload.config.max_gpu_mem)
    _fill(workload, last, path)
    chain.set_python_state({**chain.python_state, **result.module_state})
    inputs, several = chain.boundaries[0], len(chain.boundaries[0]) > 1 or chain.output_form is not None
    model = (SeveralTensorsModel if several else ExitModel)(chain, last).eval()
    program = make_program(model, inputs, f"the model of {path}")
    if several:
        outputs = ("outputs",) if chain.output_form is None or number is not None else chain.output_form.names
        report |= {"inputs": list(chain.call_form.names), "outputs": list(outputs)}
    tensors = {name: tensor.detach().contiguous() for name, tensor in program.state_dict.items()}
    if to is None:
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        folder.write(
            {
                "model.pt2": lambda file: torch.export.save(program, file),
                "model.safetensors": lambda file: _write_pieces(file, layout, {"format": "pt"}, lambda name: [tensors[name]]),
            }
        )
        return {**report, "program": str(folder.path / "model.pt2"), "weights": str(folder.path / "model.safetensors")}
    names = report.get("inputs", ["x"])
    found: list[float | None] = []
    with tempfile.TemporaryDirectory() as place:
        onnx = Path(place) / FILE_OF["onnx"]
        if to == "onnx":
            save_onnx(program, onnx, f"the model of {path}", names, report.get("outputs", ["outputs"]))
        folder.write(
            {FILE_OF[to]: lambda file: torch.export.save(program, file) if to == "pt2" else _copy(onnx, file)},
            lambda written: found.append(largest_difference(model, inputs, written / FILE_OF[to], to, names)),
        )
    return {**report, "file": str(folder.path / FILE_OF[to]), "largest_difference": found[0]}


def export_merged(workload: Workload, path: Path, folder: ExportFolder) -> dict[str, Any]:
    """Write the weights of a trained model under its own names and types: adapters are added in, stored weights decoded.

    Some rows are in memory at a time, and the adapter of their layer.

    Args:
        workload: model of the run.
        path: folder of the run.
        folder: folder for the file.

    Returns:
        What was written.

    Raises:
        ConfigError: there is nothing to merge.
        DiskError: the file could not be written.
    """
    chain = workload.chain
    with TensorFile.open(path / "model.safetensors", remedy=DAMAGED) as source:
        merged = MergedWeights(chain, lambda name, elements: source.read(name, None, elements))
        if not merged.changes_something:
            raise ConfigError(
                f"--merge has no effect here: the run in {path} has no adapters and no stored weights; leave it out"
            )
        _write_compared(folder, chain, merged.layout, merged.pieces)
    params = sum(math.prod(shape) for _, shape in merged.layout.values())
    return {"merged": True, "params": params, "file": str(folder.path / FILE_OF["safetensors"]), "largest_difference": 0.0}


def _wanted(chain: Chain, last: int) -> dict[str, Tensor]:
    """Return the tensors of the layers up to an exit, and of its head, by the names that layers know them by."""
    return {
        alias: tensor
        for number, layer in enumerate(chain.layers[: last + 1])
        for alias, tensor in (*layer.parameters().items(), *layer.buffers().items())
        if number == last or not is_of_head(alias)
    }


def _copy(source: Path, file: HashedFile) -> None:
    with source.open("rb") as stream:
        while piece := stream.read(_PIECE_BYTES):
            file.write(piece)


def _export_weights(workload: Workload, last: int, path: Path, folder: ExportFolder) -> float:
    """Write the trained tensors up to an exit under the model's own names, a tensor at a time, and read them again."""
    chain = workload.chain
    whole = last == len(chain.layers) - 1
    owners = {chain.owner_of(alias) for alias in _wanted(chain, last)}
    with ExitStack() as stack:
        homes: dict[str, TensorFile] = {}
        for file in (path / "model.safetensors", path / HEADS_FILE):
            if file.exists():
                source = stack.enter_context(TensorFile.open(file, remedy=DAMAGED))
                # The whole model is all of its names, tied ones and those that nothing depends on too.
                names = source.entries if whole and file.name != HEADS_FILE else owners & set(source.entries)
                homes |= {name: homes.get(name, source) for name in sorted(names)}
        layout = {name: (home.entries[name].dtype, tuple(home.entries[name].shape)) for name, home in homes.items()}
        _write_compared(folder, chain, layout, lambda name: [homes[name].read(name)])
    return 0.0


def _write_compared(
    folder: ExportFolder, chain: Chain, layout: Mapping[str, TensorLayout], pieces: Callable[[str], Iterable[Tensor]]
) -> None:
    """Write weights that come in pieces, and read them again, to be compared before they take their place."""
    metadata = {"format": "pt", **({VERSIONS_KEY: chain.versions} if chain.versions else {})}

    def check(written: Path) -> None:
        with TensorFile.open(written / FILE_OF["safetensors"], remedy=DAMAGED) as again:
            for name in layout:
                begin = 0
                for piece in pieces(name):
                    found = again.read(name, None, slice(begin, begin + piece.numel()))
                    begin += piece.numel()
                    if not np.array_equal(byte_view(piece.contiguous()), byte_view(found)):
                        raise DiskError(
                            f"{name!r} is not what was written to {folder.path}; check the disk, or give another --out"
                        )

    folder.write({FILE_OF["safetensors"]: lambda file: _write_pieces(file, layout, metadata, pieces)}, check)


def _write_pieces(
    file: HashedFile, layout: Mapping[str, TensorLayout], metadata: dict[str, str], pieces: Callable[[str], Iterable[Tensor]]
) -> None:
    """Write a safetensors file of tensors that come in pieces."""
    header, entries = lay_out(layout, metadata)
    file.write(header)
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        for piece in pieces(entry.name):
            file.write(byte_view(piece.contiguous()).data)


def _fill(workload: Workload, last: int, path: Path) -> None:
    """Give the layers up to an exit, and its head, their trained values."""
    chain = workload.chain
    values: dict[str, Tensor] = {}
    wanted = {chain.owner_of(alias): tensor for alias, tensor in _wanted(chain, last).items()}
    for file in (path / "model.safetensors", path / HEADS_FILE):
        if not file.exists():
            continue
        with TensorFile.open(file, remedy=DAMAGED) as source:
            for name in wanted:
                if name in source.entries and name not in values:
                    values[name] = source.read(name)
    if unsaved := [name for name in wanted if name not in chain.persistent and not is_of_head(name)]:
        # Buffers that are in no file have the constructor's values.
        with file_backed(Path(tempfile.gettempdir())):
            built = dict(workload.build_model(workload.config.seed).named_buffers(remove_duplicate=False))
        values |= {name: built[name] for name in unsaved if name in built}
    for name, tensor in wanted.items():
        if name not in values:
            raise CheckpointError(f"{path} holds no trained {name!r}; {DAMAGED}")
        found, expected = ((one.dtype, tuple(one.shape)) for one in (values[name], tensor))
        if found != expected:
            raise CheckpointError(
                f"{path} holds {name!r} as {describe(*found)}, and the model has {describe(*expected)}; {DAMAGED}"
            )
    for number, layer in enumerate(chain.layers[: last + 1]):
        for alias in (*layer.parameters(), *layer.buffers()):
            if number == last or not is_of_head(alias):
                layer.set_tensor(alias, values[chain.owner_of(alias)])
