"""Export: a trained model, up to one of its exits, as a program and weights that plain PyTorch reads."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_pnn.errors import CheckpointError, ConfigError
from lowmem_pnn.evaluation.exits import HEADS_FILE, ExitModel, num_parameters
from lowmem_pnn.memory.aligned import byte_view
from lowmem_pnn.model.layer import is_of_head
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.stores.header import describe, lay_out
from lowmem_pnn.stores.journal import DAMAGED
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.training.export_folder import ExportFolder, HashedFile
from lowmem_pnn.workload import Workload
from lowmem_pnn.zoo.deferred_init import file_backed


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
            raise ConfigError(f"{path} had no validation data to choose an exit by; give --exit K, from 1 to {count}")
        return None if result.chosen_exit is None else result.chosen_exit - 1
    if not str(exit).isdecimal() or not 1 <= int(exit) <= count:
        there = f"the run has exits 1 to {count}" if count else f"method {result.method} has no exits"
        raise ConfigError(f"--exit {exit}: {there}; give auto{', or one of these' if count else ''}")
    return int(exit) - 1


def export_exit(workload: Workload, result: Result, number: int | None, path: Path, folder: ExportFolder) -> dict[str, Any]:
    """Write the model that ends at an exit.

    Args:
        workload: model of the run; its chain's tensors are replaced.
        result: result of the run.
        number: number of the exit, from 0; None for the whole model.
        path: folder of the run.
        folder: folder for the files.

    Returns:
        What was written, and what is known of the exit.

    Raises:
        CheckpointError: a weight is missing in the run's files, or differs from the model's.
        DiskError: the files could not be written.
    """
    chain = workload.chain
    if len(chain.boundaries[0]) > 1 or chain.output_form is not None:
        raise ConfigError(
            f"the model of {path} takes several tensors, or returns a structure, and a program is made for one of each; its weights are "
            f"in {path / 'model.safetensors'}"
        )
    if result.exits and len(result.exits) != len(chain.layers):
        raise CheckpointError(f"{path} has {len(result.exits)} exits, and its model {len(chain.layers)} layers; {DAMAGED}")
    last = len(chain.layers) - 1 if number is None else number
    _fill(workload, last, path)
    params = num_parameters(chain, last)
    model = ExitModel(chain, last).eval()
    (sample,) = chain.boundaries[0]
    example = torch.zeros(2, *sample.shape, dtype=sample.dtype)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    tensors = {name: tensor.detach().contiguous() for name, tensor in program.state_dict.items()}
    folder.write(
        {
            "model.pt2": lambda file: torch.export.save(program, file),
            "model.safetensors": lambda file: _write_tensors(file, tensors),
        }
    )
    known = result.exits[last] if result.exits else {}
    return {
        "exit": last + 1 if number is not None else None,
        "layer": chain.layers[last].name,
        "params": params,
        "val_accuracy": known.get("val_accuracy", result.val_accuracy),
        "program": str(folder.path / "model.pt2"),
        "weights": str(folder.path / "model.safetensors"),
    }


def _write_tensors(file: HashedFile, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    header, entries = lay_out(layout, {"format": "pt"})
    file.write(header)
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        file.write(byte_view(tensors[entry.name]).data)


def _fill(workload: Workload, last: int, path: Path) -> None:
    """Give the layers up to an exit, and its head, their trained values."""
    chain = workload.chain
    values: dict[str, Tensor] = {}
    wanted = {
        chain.owner_of(alias): tensor
        for number, layer in enumerate(chain.layers[: last + 1])
        for alias, tensor in (*layer.parameters().items(), *layer.buffers().items())
        if number == last or not is_of_head(alias)
    }
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
