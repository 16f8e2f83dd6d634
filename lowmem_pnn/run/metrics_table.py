"""The table of metrics: the committed lines of `metrics.jsonl` as `metrics.csv`, for spreadsheets and data frames."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowmem_pnn.errors import DiskError
from lowmem_pnn.run.session import Session
from lowmem_pnn.stores.disk import disk_error, write_durably

TABLE = "metrics.csv"
"""The file's name in a run's folder."""

COLUMNS = (
    "action", "visit", "partition", "epoch", "step", "split", "loss", "lr", "train_loss", "val_loss", "val_accuracy", "samples_per_second",
    "micro_batch", "used_bytes", "peak_bytes", "macs", "bytes_read", "bytes_written", "seconds",
)  # fmt: skip
"""Columns that every table has, in this order; after them come `val_NAME` of the task's other scores, and `waiting_NAME`."""


def write_metrics_table(session: Session) -> None:
    """Write `metrics.csv` from the lines that the last commit covers: what a resume would do again is not in it.

    The table says nothing that `metrics.jsonl` does not; so a disk that refuses it is told of, and ends nothing.

    Args:
        session: the process's side of the run.
    """
    rundir = session.rundir
    try:
        write_durably(rundir.path / TABLE, metrics_table(rundir.path / "metrics.jsonl", rundir.journal()["metrics_bytes"]))
    except DiskError as error:
        session.display.message(f"{TABLE} is left out ({error}); metrics.jsonl has all of it")


def metrics_table(log: Path, size: int) -> str:
    """Return the lines of a log as CSV, a row for each: cells that a line says nothing of are empty.

    Args:
        log: path of `metrics.jsonl`.
        size: bytes of it that count.

    Raises:
        DiskError: it cannot be read.
    """
    try:
        more = dict.fromkeys(name for row in _rows(log, size) for name in row if name not in COLUMNS)
        text = io.StringIO()
        writer = csv.DictWriter(text, [*COLUMNS, *sorted(more)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(_rows(log, size))
    except OSError as error:
        raise disk_error(log, error, "read it") from error
    return text.getvalue()


def _rows(log: Path, size: int) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log as rows: mappings are laid out in columns, and timelines of memory left out."""
    if not size:
        return
    with log.open("rb") as file:
        while file.tell() < size and (content := file.readline()):
            row: dict[str, Any] = {}
            for name, value in json.loads(content).items():
                if isinstance(value, Mapping):
                    row.update({f"{name}_{key}": each for key, each in value.items()})
                elif not isinstance(value, list):
                    row[name] = value
            yield row
