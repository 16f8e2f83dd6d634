"""The meta model's run: an ordinary training in a folder inside the run's, planned, committed and resumed like any other."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from lowmem_pnn.config.resume import resume_command
from lowmem_pnn.errors import BudgetError, CheckpointError, DivergedError, Stopped
from lowmem_pnn.methods import Visit
from lowmem_pnn.planning.make_plan import SecondsOf, make_plan
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.planning.time_estimate import TimeEstimator
from lowmem_pnn.profiling.costs import MemoryProfile
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.finished import read_result
from lowmem_pnn.run.ranks import ALONE
from lowmem_pnn.run.resume import count_resume, resumed_state
from lowmem_pnn.run.run import Run
from lowmem_pnn.run.session import Session
from lowmem_pnn.run.state import State
from lowmem_pnn.stores.disk import RUN_REMEDY
from lowmem_pnn.stores.journal import JOURNAL, read_journal
from lowmem_pnn.stores.run_creation import META_FOLDER
from lowmem_pnn.stores.run_directory import RunDirectory
from lowmem_pnn.training.join import forget
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import Workload, meta_model, profile_workload

RunToEnd = Callable[[Session, Workload, MemoryProfile, State, SecondsOf], Result | None]
"""Brings a run from any commit to its end (`lifecycle.run_to_end`)."""


def train_meta_model(run: Run, visit: Visit, run_to_end: RunToEnd) -> None:
    """Train the meta model of a run's partitions, or go on with it; its time and its bytes are the run's.

    Args:
        run: the run, with no partition resident.
        visit: the visit that this is.
        run_to_end: trains it.

    Raises:
        Stopped: the run was asked to stop.
        DivergedError: the meta model's loss is not finite.
        BudgetError: it does not fit.
    """
    session = run.session
    workload = meta_model(run.workload, run.plan.spans).workload
    began = time.monotonic()
    session.display.message(f"training the meta model of {len(run.plan.partitions)} thin parts first, {visit.epochs} epochs")
    try:
        result = _train(run, workload, run_to_end)
    except Stopped:
        command = resume_command(run.workload.config, session.rundir.path)
        raise Stopped(f"stopped; {command} goes on from the last commit") from None
    except DivergedError as error:
        raise DivergedError(f"in the meta model, {error}") from error
    except BudgetError as error:
        raise BudgetError(f"the meta model does not fit: {error}", error.enough_bytes) from error
    # Of its own visits: the process may have had its peak before, in the check before training.
    peak = result.partitions[0]["peak_bytes"]
    run.metrics.take_over(result.seconds - (time.monotonic() - began), peak, result.host_peak_bytes)
    session.counter.add(read=result.bytes_read, written=result.bytes_written)
    facts = {
        "params": run.plan.meta_params,
        "epochs": visit.epochs,
        "seconds": result.seconds,
        "peak_bytes": peak,
        "train_loss": result.train_loss,
        "test_loss": result.test_loss,
        "test_accuracy": result.test_accuracy,
    }
    run.note_meta_model(facts, result.oom_retries)
    accuracy = "" if result.test_accuracy is None else f", test accuracy {result.test_accuracy:.2%}"
    session.display.message(f"the meta model is trained{accuracy}, within {format_bytes(peak)}")


def check_meta_model(path: Path) -> None:
    """Refuse a meta model that is not as its training left it: partitions learn, and are measured, through its thin parts.

    Args:
        path: folder of a run whose meta model is trained.

    Raises:
        CheckpointError: a file of it is missing or damaged.
    """
    folder = path / META_FOLDER
    if not (folder / JOURNAL).exists():
        raise CheckpointError(f"{folder} is missing, the trained meta model of the run; {RUN_REMEDY}")
    read_result(folder, State.from_journal(read_journal(folder / JOURNAL)[0], folder))


def _train(run: Run, workload: Workload, run_to_end: RunToEnd) -> Result:
    """Train a workload in a folder inside the run's; return its result, which is there at once if it was trained before."""
    outer, path = run.session, run.session.rundir.path / META_FOLDER
    profile = profile_workload(workload, outer.device)
    request = PlanRequest(workload, profile, outer.device)
    estimator = TimeEstimator.nominal(request)
    with ExitStack() as stack:
        if (path / "journal.json").exists():
            rundir = stack.enter_context(RunDirectory.open(path))
            state = resumed_state(rundir, workload, ALONE)
            if state.stage == "done":
                result = read_result(path, state)
                rundir.clear()
                forget(rundir, state)
                return result
            count_resume(rundir, state, workload, after_crash=outer.after_crash)
        else:
            state = State.first(workload, make_plan(request, estimator), ALONE)
            rundir = stack.enter_context(RunDirectory.create(path, workload.config.to_json(), state.to_journal()))
        session = Session(outer.device, rundir, outer.threads, outer.display, outer.should_stop)
        result_or_none = run_to_end(session, workload, profile, state, estimator)
        assert result_or_none is not None, "one process trains it"
        return result_or_none
