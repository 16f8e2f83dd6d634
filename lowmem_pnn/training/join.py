"""Join: the first of several processes takes over the partitions that the others have trained."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lowmem_pnn.errors import BusyError, CheckpointError, DiskError
from lowmem_pnn.run.ranks import rank_folder
from lowmem_pnn.run.run import Run
from lowmem_pnn.run.state import State
from lowmem_pnn.stores.journal import read_journal
from lowmem_pnn.stores.run_creation import delete_run
from lowmem_pnn.stores.run_directory import RunDirectory
from lowmem_pnn.stores.weights import WeightStore

_LOOK_EVERY_SECONDS = 0.2


def join(run: Run) -> Sequence[int]:
    """Wait for the other ranks, and copy what they have trained into working files.

    Args:
        run: run of the first process, whose own partition is trained.

    Returns:
        The partitions whose files changed.

    Raises:
        Stopped: the run was asked to stop while it waited.
        CheckpointError: a rank's run is damaged, or was planned otherwise.
    """
    others = range(1, run.state.ranks)
    for number in others:
        folder = rank_folder(run.session.rundir.path, number)
        if not _is_trained(folder):
            run.session.display.message(f"waiting for partition {number + 1} of {run.state.ranks}")
        while not _is_trained(folder):
            run.commits.stop_if_asked()
            time.sleep(_LOOK_EVERY_SECONDS)
        _take(run, number, folder)
    return list(others)


def forget(rundir: RunDirectory, state: State) -> None:
    """Delete the other processes' runs: the first one has what was in them.

    Args:
        rundir: directory of the first process's run, which is done.
        state: its state.
    """
    for number in range(1, 1 if state.rank else state.ranks):
        folder = rank_folder(rundir.path, number)
        # A folder of that name may be of another run by now; and what cannot be deleted is no reason to fail in the end.
        with suppress(CheckpointError, BusyError, DiskError, OSError):
            with RunDirectory.open(folder) as theirs:
                other = State.from_journal(theirs.journal(), folder)
                is_ours = (other.rank, other.ranks) == (number, state.ranks) and theirs.config_json() == rundir.config_json()
            if is_ours:
                delete_run(folder)


def _is_trained(folder: Path) -> bool:
    """Whether a process is done with its partition; its folder may not even be there yet."""
    path = folder / "journal.json"
    return path.exists() and State.from_journal(read_journal(path)[0], folder).stage == "trained"


def _take(run: Run, number: int, folder: Path) -> None:
    """Copy a partition's trained weights, and take over what was recorded of it."""
    # The lock comes free when the rank's process has ended its run.
    with RunDirectory.open(folder) as rundir:
        theirs = State.from_journal(rundir.journal(), folder)
        if rundir.config_json() != run.session.rundir.config_json() or theirs.data != run.state.data:
            raise CheckpointError(
                f"the run in {folder} is not of this one: another configuration, or other data; begin again with --overwrite"
            )
        cuts = [[part["start"] for part in state.plan["partitions"]] for state in (run.state, theirs)]
        if cuts[0] != cuts[1]:
            raise CheckpointError(
                f"the ranks cut the model differently, since less memory was free for one: {run.session.rundir.path} before layers "
                f"{cuts[0][1:]}, "
                f"{folder} before layers {cuts[1][1:]}; begin again with --overwrite and --cuts"
            )
        store = WeightStore.open(folder / "weights", theirs.weights, counter=run.session.counter)
        with store.reader(number) as source, run.weights.writer(number) as target:
            for name in store.layout(number):
                target.copy_from(name, source, name)
    run.take_over(number, theirs)
