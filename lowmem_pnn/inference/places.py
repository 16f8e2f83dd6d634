"""Places that answers are written to: beside what they are to replace, and renamed when all is there; nothing else is replaced."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.exporting.out_faults import writing_faults
from lowmem_pnn.stores.disk import remove_folder, sync_folder

Kind = Literal["npz", "csv", "masks"]


@dataclass(frozen=True)
class Place:
    """Place of answers.

    Args:
        path: Path of the file or folder.
        kind: What is written there.
    """

    path: Path
    kind: Kind

    @classmethod
    def find(cls, out: str | Path, overwrite: bool) -> "Place":
        """Find out what is to be written, and refuse what is there already, before anything is computed.

        Args:
            out: Path that was asked for: FILE.npz, FILE.csv, or a folder for masks.
            overwrite: Whether what an earlier prediction wrote there is replaced.

        Raises:
            ConfigError: It ends otherwise, or is there already.
        """
        text, path = str(out), Path(out).expanduser()
        suffix = path.suffix.lower()
        if not text:
            raise ConfigError("--out is empty; give FILE.npz, FILE.csv, or a folder for masks, DIR/")
        if text.endswith("/") or path.is_dir() or not suffix:
            kind: Kind = "masks"
        elif suffix in (".npz", ".csv"):
            kind = "npz" if suffix == ".npz" else "csv"
        else:
            raise ConfigError(f"--out {text} ends in {path.suffix!r}; give FILE.npz, FILE.csv, or a folder for masks, DIR/")
        above = next((parent for parent in path.parents if os.path.lexists(parent)), Path())
        if not above.is_dir():
            raise ConfigError(f"--out {text} lies below {above}, which is a file; give another")
        if os.path.lexists(path):
            if not overwrite:
                raise ConfigError(f"--out {text} is there already; give another, or --overwrite")
            if kind == "masks" and not path.is_dir():
                raise ConfigError(f"--out {text} is a file, and masks take a folder; give another")
            if path.is_symlink() or (kind == "masks" and _other_than_masks(path) is not None):
                what = "a link" if path.is_symlink() else f"a folder with {_other_than_masks(path)} in it, which is no mask"
                raise ConfigError(f"--out {text} is {what}, and is not replaced; give another")
        return cls(path, kind)

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Make a folder beside the place to write in; what is then called as the place is takes its place at the end.

        Yields:
            The folder.

        Raises:
            DiskError: The disk is full, or not writable; nothing is changed then.
        """
        with writing_faults(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        try:
            yield folder
            with writing_faults(self.path):
                if self.kind == "masks" and self.path.exists():
                    self.path.rename(folder / f"before {self.path.name}")
                (folder / self.path.name).replace(self.path)
                sync_folder(self.path.parent)
        finally:
            remove_folder(folder)


def _other_than_masks(folder: Path) -> str | None:
    """Return the name of a file of a folder, at any depth, that no prediction has written there."""
    return next(
        (path.name for path in folder.rglob("*") if path.is_symlink() or (path.is_file() and path.suffix != ".png")), None
    )
