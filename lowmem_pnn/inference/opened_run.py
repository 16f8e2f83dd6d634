"""A finished run that is open: its folder, its threads and what it left, for whoever evaluates it, predicts by it or has it go on with texts."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.run.finished import FinishedRun, open_finished
from lowmem_pnn.run.only_run import only_run
from lowmem_pnn.stores.disk import file_system_faults
from lowmem_pnn.stores.run_directory import RunDirectory
from lowmem_pnn.training.start import full_is_a_budget_error, worker_threads


@contextmanager
def opened_run(path: Path) -> Iterator[tuple[RunDirectory, WorkerThreads, FinishedRun]]:
    """Open a finished run to read, inside the context.

    Args:
        path: folder of the run.

    Yields:
        Its folder, threads that read and write, and what it left.

    Raises:
        BudgetError: memory ran out.
        BusyError: another thread has a run.
        CheckpointError: there is no finished run.
        DiskError: the file system refused.
    """
    with (
        file_system_faults(path),
        only_run(),
        full_is_a_budget_error(),
        RunDirectory.open(path, to_read=True) as rundir,
        worker_threads() as threads,
    ):
        yield rundir, threads, open_finished(rundir)
