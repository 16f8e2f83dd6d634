"""Journal of a run: what a commit says, sealed by a checksum, and the commits that are kept beside the last one."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from lowmem_pnn.errors import CheckpointError, DiskError
from lowmem_pnn.stores.disk import disk_error, read_file
from lowmem_pnn.stores.keys import parse_state

FORMAT = 1
JOURNAL = "journal.json"

DAMAGED = "restore it from a copy, or begin again with --overwrite"
"""What to do about a run that is damaged: the end of error messages."""

REPLACED = json.dumps({"format": FORMAT, "replaced": True}).encode() + b"\n"
"""Text of the journal of a run that is being replaced: whatever of its files is there yet, it is no run any more."""

_OLDER = re.compile(r"journal\.(\d{6,})\.json")


def older_name(number: int) -> str:
    """Return the name of the file that keeps an older commit.

    Example:
        >>> older_name(41)
        'journal.000041.json'
    """
    return f"journal.{number:06d}.json"


def seal_journal(body: dict[str, Any], config_sha256: str) -> str:
    """Return a journal's text: the body with its checksum, and the checksum of the run's configuration."""
    sealed = {"format": FORMAT, "sha256": _digest(body, config_sha256), "config_sha256": config_sha256, "body": body}
    # On one line: with an indent it is Python's own encoder that writes, whose functions refer to each other until garbage is collected.
    return json.dumps(sealed, sort_keys=True) + "\n"


def read_journal(path: Path) -> tuple[dict[str, Any], str]:
    """Read and check a journal.

    Returns:
        The journal's body, and the checksum of the run's configuration.

    Raises:
        CheckpointError: The journal is missing, damaged, of another version, or of a run that was being replaced.
        DiskError: The file system refused.
    """
    text = b""
    try:
        text = read_file(path, DAMAGED)
        sealed = json.loads(text)
        body, config_sha256, version = sealed["body"], sealed["config_sha256"], sealed["format"]
        intact = isinstance(body, dict) and _digest(body, config_sha256) == sealed["sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {path.parent} is no run to resume; give the --workdir of one") from None
    except OSError as error:
        raise disk_error(path, error, "read it") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        if text == REPLACED:
            raise CheckpointError(
                f"the run in {path.parent} was being replaced by another one; begin that again with --overwrite"
            ) from None
        raise CheckpointError(f"{path} is no journal; {DAMAGED}") from None
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}, this version reads {FORMAT}; resume with the version that wrote it")
    if not intact:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum; {DAMAGED}")
    return body, config_sha256


def older_commits(folder: Path, config_sha256: str | None = None) -> tuple[list[tuple[Path, dict[str, Any]]], list[Path]]:
    """Return the kept journals before the last one.

    Args:
        folder: Folder of the run.
        config_sha256: Checksum of the run's configuration, without which a journal is another run's; None to take any.

    Returns:
        Paths and bodies of the commits, newest first; and the files that have a commit's name and hold none of this run.
    """
    commits, others = [], []
    for path in sorted(folder.iterdir() if folder.is_dir() else (), key=_number, reverse=True):
        if _OLDER.fullmatch(path.name) is None:
            continue
        try:
            body, config = read_journal(path)
        except (CheckpointError, DiskError):
            others.append(path)
            continue
        if body.get("number") == _number(path) and config_sha256 in (None, config):
            commits.append((path, body))
        else:
            others.append(path)
    return commits, others


def last_whole_commit(folder: Path) -> Path | None:
    """Return the newest kept journal whose weight files are all there, in their sizes; None where there is none.

    Args:
        folder: Folder of the run.
    """
    for path, body in older_commits(folder)[0]:
        try:
            files = parse_state(folder / "weights", body["weights"]).values() if body.get("weights") else ()
            if all((folder / "weights" / file.file).stat().st_size == file.bytes for file in files):
                return path
        except (CheckpointError, OSError):
            continue
    return None


def _number(path: Path) -> int:
    match = _OLDER.fullmatch(path.name)
    return -1 if match is None else int(match[1])


def _digest(body: dict[str, Any], config_sha256: str) -> str:
    content = json.dumps(body, sort_keys=True) + config_sha256
    return hashlib.sha256(content.encode()).hexdigest()
