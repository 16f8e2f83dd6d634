"""Export: a trained model, up to one of its exits, as a program and weights that plain PyTorch reads."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lowmem_pnn.errors import CheckpointError, ConfigError, DiskError
from lowmem_pnn.evaluation.exits import HEADS_FILE, ExitModel, num_parameters
from lowmem_pnn.model.layer import is_of_head
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.workload import Workload


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


def export_exit(workload: Workload, result: Result, number: int | None, path: Path, out: Path | None) -> dict[str, Any]:
    """Write the model that ends at an exit.

    Args:
        workload: model of the run; its chain's tensors are replaced.
        result: result of the run.
        number: number of the exit, from 0; None for the whole model.
        path: folder of the run.
        out: folder for the files; None for one in the run's folder.

    Returns:
        What was written, and what is known of the exit.

    Raises:
        CheckpointError: a weight is missing in the run's files.
        DiskError: the files could not be written.
    """
    chain = workload.chain
    last = len(chain.layers) - 1 if number is None else number
    folder = out or path / (f"exit-{last + 1}" if number is not None else "export")
    _fill(workload, last, path)
    params = num_parameters(chain, last)
    model = ExitModel(chain, last).eval()
    (sample,) = chain.boundaries[0]
    example = torch.zeros(2, *sample.shape, dtype=sample.dtype)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.export.save(program, folder / "model.pt2")
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in program.state_dict.items()}, folder / "model.safetensors"
        )
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DiskError(f"cannot write to {folder}: {reason}; give another --out") from error
    known = result.exits[last] if result.exits else {}
    return {
        "exit": last + 1 if number is not None else None,
        "layer": chain.layers[last].name,
        "params": params,
        "val_accuracy": known.get("val_accuracy", result.val_accuracy),
        "program": str(folder / "model.pt2"),
        "weights": str(folder / "model.safetensors"),
    }


def _fill(workload: Workload, last: int, path: Path) -> None:
    """Give the layers up to an exit, and its head, their trained values."""
    chain = workload.chain
    values: dict[str, torch.Tensor] = {}
    for file in (path / "model.safetensors", path / HEADS_FILE):
        if not file.exists():
            continue
        with safe_open(file, framework="pt") as source:
            held = set(source.keys())
            for number, layer in enumerate(chain.layers[: last + 1]):
                for alias in (*layer.parameters(), *layer.buffers()):
                    name = chain.owner_of(alias)
                    if name in held and name not in values and (number == last or not is_of_head(name)):
                        values[name] = source.get_tensor(name)
    for number, layer in enumerate(chain.layers[: last + 1]):
        for alias in (*layer.parameters(), *layer.buffers()):
            if is_of_head(alias) and number < last:
                continue
            name = chain.owner_of(alias)
            if name not in values:
                raise CheckpointError(f"{path} holds no trained {name!r}; restore its files from a copy")
            layer.set_tensor(alias, values[name])
