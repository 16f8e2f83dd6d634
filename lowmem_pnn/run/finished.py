"""Finished runs: the files that a run leaves, checked by whoever reads them."""

import dataclasses
from pathlib import Path

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.resume import resume_command, with_new_modules
from lowmem_pnn.config.transformers_place import is_transformers, place_of
from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.resume import stored_config
from lowmem_pnn.run.state import LEFT_FILES, State
from lowmem_pnn.stores.disk import disk_error, read_file, sha256
from lowmem_pnn.stores.journal import DAMAGED
from lowmem_pnn.stores.keys import CommittedFile, parse_entry
from lowmem_pnn.stores.run_creation import TRANSFORMERS_FOLDER
from lowmem_pnn.stores.run_directory import RunDirectory
from lowmem_pnn.stores.tensor_file import TensorFile


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """Finished run, all of whose files are as it left them.

    Args:
        config: options of the run, and which modules have learnt whole beside adapters.
        state: its last state.
        result: what it came to.
    """

    config: FitConfig
    state: State
    result: Result


def open_finished(rundir: RunDirectory) -> FinishedRun:
    """Return a run that has finished, its files checked.

    Args:
        rundir: directory of the run.

    Raises:
        CheckpointError: it has not finished, or a file is missing or damaged.
    """
    state = State.from_journal(rundir.journal(), rundir.path)
    config = stored_config(rundir)
    if state.stage != "done":
        raise CheckpointError(f"{rundir.path} has not finished; {resume_command(config, rundir.path)} goes on with it")
    result = read_result(rundir.path, state)
    config = with_new_modules(config, result.weights)
    return FinishedRun(_with_kept_model(config, rundir.path), state, result)


def _with_kept_model(config: FitConfig, path: Path) -> FitConfig:
    """Return the options with the run's own folder as the model, where that of a model of transformers is gone."""
    place = place_of(config.model) if is_transformers(config.model) else None
    own = path.absolute() / TRANSFORMERS_FOLDER
    if place is None or place.exists() or not (own / "config.json").is_file():
        return config
    return dataclasses.replace(config, model=f"hf:{own}")


def read_result(path: Path, state: State) -> Result:
    """Return what a finished run came to, after a check of all that it left; places in it are those where the run lies now.

    Args:
        path: folder of the run.
        state: last state of the run, which says what it left. A run of an earlier version does not say it: then the weights are
            checked against their own header.

    Raises:
        CheckpointError: a file is missing or damaged.
        DiskError: the file system refused.
    """
    for name in LEFT_FILES:
        if name in state.files:
            check_file(path / name, parse_entry(state.files[name], name))
        elif not state.files and (name != "heads.safetensors" or (path / name).exists()) and name.endswith(".safetensors"):
            _check_exists(path / name)
            TensorFile.open(path / name, remedy=DAMAGED).close()
    file = path / "result.json"
    try:
        result = Result.from_json(read_file(file, DAMAGED).decode()).moved_to(path)
        str(result)  # which shows what is missing in it
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{file} cannot be read: {(error.strerror or str(error)).lower()}; {DAMAGED}") from error
    except OSError as error:
        raise disk_error(file, error, "read it") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: it is no result of a run; {DAMAGED}") from error
    if result.chosen_exit is not None and not 1 <= result.chosen_exit <= len(result.exits):
        raise CheckpointError(f"{file} chooses exit {result.chosen_exit} of {len(result.exits)}; {DAMAGED}")
    return result


def check_file(path: Path, expected: CommittedFile) -> None:
    """Compare a file with what was recorded of it.

    Args:
        path: path of the file.
        expected: its size and hash.

    Raises:
        CheckpointError: it is missing, or differs.
        DiskError: the file system refused.
    """
    size = _check_exists(path)
    if size != expected.bytes:
        raise CheckpointError(f"{path} has {size} bytes, and the run left {expected.bytes}; {DAMAGED}")
    if (digest := sha256(path)) != expected.sha256:
        raise CheckpointError(f"{path} has sha256 {digest}, and the run left {expected.sha256}; {DAMAGED}")


def _check_exists(path: Path) -> int:
    """Return the size of a file."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is missing; {DAMAGED}") from None
    except OSError as error:
        raise disk_error(path, error, "look at it") from error
