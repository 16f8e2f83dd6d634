"""Names in weight files and journals: keys of weights and optimizer state, file names, and the entries of committed files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.stores.disk import RUN_REMEDY

FORMAT = 1

PartitionName = int | Literal["rest"]
"""Number of a partition, or `rest` for the tensors that do not change, or that no partition uses."""

WEIGHT_FILE = re.compile(r"(?:p(?P<partition>\d{3,})|rest)\.g(?P<generation>\d+)\.safetensors")


def weight_key(name: str) -> str:
    """Return the name of a parameter or buffer in a weight file.

    Example:
        >>> weight_key("layer1.0.bn1.running_mean")
        'weight/layer1.0.bn1.running_mean'
    """
    return f"weight/{name}"


def state_key(name: str, state: str) -> str:
    """Return the name of a parameter's optimizer state in a weight file.

    Example:
        >>> state_key("fc.bias", "exp_avg")
        'optimizer/fc.bias/exp_avg'
    """
    return f"optimizer/{name}/{state}"


@dataclass(frozen=True)
class CommittedFile:
    """Committed weight file, as the journal names it."""

    file: str
    sha256: str
    bytes: int


def parse_entry(entry: Any, what: str) -> CommittedFile:
    """Return what a journal says of a file.

    Args:
        entry: `CommittedFile` as a dictionary.
        what: What the entry is of, for the message.

    Raises:
        CheckpointError: The entry is not of this form.
    """
    if (
        isinstance(entry, Mapping)
        and set(entry) == {"file", "sha256", "bytes"}
        and isinstance(entry["file"], str)
        and isinstance(entry["sha256"], str)
        and type(entry["bytes"]) is int
    ):
        return CommittedFile(**entry)
    raise CheckpointError(f"the journal's entry of {what} is none that this program writes; {RUN_REMEDY}")


def parse_name(file: str) -> tuple[PartitionName, int]:
    """Return the partition and the generation in a weight file's name."""
    match = WEIGHT_FILE.fullmatch(file)
    assert match is not None, "only weight files are parsed"
    return ("rest" if match["partition"] is None else int(match["partition"])), int(match["generation"])


def parse_state(folder: Path, state: Mapping[str, Any]) -> dict[PartitionName, CommittedFile]:
    """Return the files that a journal's state of weights names.

    Args:
        folder: Folder of the weight files, for messages.
        state: State, as `WeightStore.state` returned it.

    Raises:
        CheckpointError: The state is of another version, or names no file, or a wrong one, for a partition.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("partitions"), list):
        raise CheckpointError(f"the journal says nothing of the weights in {str(folder)!r}; {RUN_REMEDY}")
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"the journal's weights in {str(folder)!r} have format {state.get('format')}, this version reads {FORMAT}; "
            "resume with the version that wrote them"
        )
    entries: list[tuple[PartitionName, Any]] = [*enumerate(state["partitions"])]
    if state.get("rest") is not None:
        entries.append(("rest", state["rest"]))
    committed = {}
    for partition, entry in entries:
        if entry is None:
            raise CheckpointError(f"partition {partition} in {str(folder)!r} was never committed; start again with --overwrite")
        file = parse_entry(entry, f"partition {partition} in {str(folder)!r}")
        if WEIGHT_FILE.fullmatch(file.file) is None or parse_name(file.file)[0] != partition:
            raise CheckpointError(f"the journal names {file.file!r} for partition {partition} in {str(folder)!r}; {RUN_REMEDY}")
        committed[partition] = file
    return committed


VERSIONS_KEY = "state_dict_metadata"
"""Name under which the header of exported weights has the versions of the model's modules, where the model cannot do without."""
