"""Naming: weight files, the tensors in them, and committed files in a journal."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowmem_pnn.errors import CheckpointError

FORMAT = 1

PartitionName = int | Literal["rest"]
"""A partition's number, or the tensors that no partition uses."""

WEIGHT_FILE = re.compile(r"(?:p(?P<partition>\d{3,})|rest)\.g(?P<generation>\d+)\.safetensors")
REMEDY = "restore the run's folder from a copy, or start again with --overwrite"


def weight_key(name: str) -> str:
    """A parameter's or buffer's name in a weight file.

    Example:
        >>> weight_key("layer1.0.bn1.running_mean")
        'weight/layer1.0.bn1.running_mean'
    """
    return f"weight/{name}"


def state_key(name: str, state: str) -> str:
    """The name of a parameter's optimizer state in a weight file.

    Example:
        >>> state_key("fc.bias", "exp_avg")
        'optimizer/fc.bias/exp_avg'
    """
    return f"optimizer/{name}/{state}"


@dataclass(frozen=True)
class Sealed:
    """A committed file, as the journal names it."""

    file: str
    sha256: str
    bytes: int


def parse_name(file: str) -> tuple[PartitionName, int]:
    """Partition and generation of a weight file's name."""
    match = WEIGHT_FILE.fullmatch(file)
    assert match is not None, "only weight files are parsed"
    return ("rest" if match["partition"] is None else int(match["partition"])), int(match["generation"])


def parse_state(folder: Path, state: Mapping[str, Any]) -> dict[PartitionName, Sealed]:
    """The files that a state names."""
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"the journal's weights in {str(folder)!r} have format {state.get('format')}, this version reads {FORMAT}; "
            "resume with the version that wrote them"
        )
    entries: list[tuple[PartitionName, Any]] = [*enumerate(state["partitions"])]
    if state["rest"] is not None:
        entries.append(("rest", state["rest"]))
    committed = {}
    for partition, entry in entries:
        if entry is None:
            raise CheckpointError(f"partition {partition} in {str(folder)!r} was never committed; start again with --overwrite")
        sealed = Sealed(**entry)
        if WEIGHT_FILE.fullmatch(sealed.file) is None or parse_name(sealed.file)[0] != partition:
            raise CheckpointError(f"the journal names {sealed.file!r} for partition {partition} in {str(folder)!r}; {REMEDY}")
        committed[partition] = sealed
    return committed
