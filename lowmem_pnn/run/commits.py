"""Commits: states of a run that a resume can go on from, made durable in the background."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.resume import resume_command
from lowmem_pnn.errors import DiskError, Stopped
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.run.metrics import Metrics
from lowmem_pnn.run.session import Session
from lowmem_pnn.run.state import State, states_of, weights_of
from lowmem_pnn.stores import disk
from lowmem_pnn.stores.disk import remove_folder
from lowmem_pnn.stores.keys import PartitionName
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.units import format_bytes

Save = Callable[[], Sequence[int]]
"""Writes the present weights to working files, and returns the partitions whose files changed since the last commit."""


def nothing_changed() -> Sequence[int]:
    """Write nothing, since no weights moved."""
    return ()


class Commits:
    """Makes the present state of a run the one to resume from, or returns to the last such state.

    Args:
        session: the process's side of the run.
        config: options of the run.
        weights: weight files of the run, as of the last commit.
        state: state of the run, as of the last commit.
        metrics: records of the run, which are brought up to date before a commit.
        chain: the model, whose modules may hold Python state that belongs to a commit.
    """

    def __init__(
        self, session: Session, config: FitConfig, weights: WeightStore, state: State, metrics: Metrics, chain: Chain
    ) -> None:
        self._session = session
        self._chain = chain
        self._config = config
        self._weights = weights
        self._state = state
        self._metrics = metrics
        self._pending: Future[None] | None = None
        self._last_commit = time.monotonic()
        # Stores of activations that a journal on disk names, and all that some commit has named, which only the end of that
        # commit may delete.
        states = (state, *states_of(session.rundir.older_journals()))
        self._named = {folder for one in states for folder in one.activations.values()}
        self._promised = set(self._named)
        # Partitions whose working files the next commit includes.
        self._staged: set[int] = set()

    def commit(self, save: Save = nothing_changed) -> None:
        """Make the present state the one to resume from. Syncing and hashing go on in the background.

        Args:
            save: writes weights that moved since the last commit to working files.

        Raises:
            DiskError: the commit before this one could not be made durable.
        """
        self.wait()
        self._metrics.update_record()
        changed = sorted({*save(), *self._staged})
        self._staged.clear()
        # What has no working file now may have one, half written, by the time that the committing thread looks.
        frozen = self._weights.freeze(changed)
        self._metrics.update_totals()
        self._state.number += 1
        self._state.module_state = self._chain.python_state
        self._state.metrics_bytes = self._session.rundir.metrics_bytes()
        journal = self._state.to_journal()
        self._promised.update(journal["activations"].values())
        self._pending = self._session.threads.commit.submit(self._finish, journal, frozen)
        self._last_commit = time.monotonic()

    def stage_for_commit(self, save: Save) -> None:
        """Write weights to working files now; the next commit includes them.

        Args:
            save: writes the weights.
        """
        self._staged.update(save())

    def commit_if_due(self, save: Save) -> None:
        """Commit if `--commit-every` seconds have passed since the last commit, or if the run is to stop.

        Args:
            save: writes weights that moved since the last commit to working files.

        Raises:
            Stopped: the run was asked to stop; everything up to now is committed.
        """
        if self._session.should_stop():
            self.commit(save)
            self.stop_if_asked()
        if time.monotonic() - self._last_commit >= self._config.commit_every:
            self.commit(save)

    def stop_if_asked(self) -> None:
        """End the run if it was asked to stop.

        Raises:
            Stopped: it was.
        """
        if self._session.should_stop():
            self.wait()
            raise Stopped(f"stopped; {resume_command(self._config, self._session.rundir.path)} goes on from the last commit")

    def wait(self) -> None:
        """Wait until the last commit is durable.

        Raises:
            DiskError: it could not be made so.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
            self._session.callbacks.tell("on_commit", {"number": self._state.number, "seconds": self._state.seconds})

    def roll_back(self) -> None:
        """Return to the last commit: what was trained since then did not happen. No partition may be resident."""
        self.wait()
        self._weights.rollback()
        self._staged.clear()
        commit = State.from_journal(self._session.rundir.journal(), self._session.rundir.path)
        self._state.go_back_to(commit)
        self._chain.set_python_state(commit.module_state)
        self._session.rundir.cut_metrics(commit.metrics_bytes)
        self._metrics.drop_record()

    @property
    def activations(self) -> Path:
        """Folder of the stores of boundary activations."""
        return self._session.folder / "activations"

    def drop_store(self, name: str) -> None:
        """Delete a store of activations that no commit names; a store that a commit names is deleted with that commit.

        Args:
            name: name of the store's folder.
        """
        if name not in self._promised:
            remove_folder(self.activations / name)

    def _finish(self, journal: dict[str, Any], frozen: Sequence[PartitionName]) -> None:
        """On the committing thread: seal the frozen weight files, write the journal, and delete what no kept journal names."""
        if frozen:
            journal["weights"] = self._state.weights = self._weights.seal(frozen)
        best = journal["best"]
        if self._config.keep_weights == "best" and best["step"] and not best["weights"]:
            best["weights"] = journal["weights"]
            present = self._state.best  # read once: training may find another one meanwhile
            if present.step == best["step"]:
                present.weights = journal["weights"]
        rundir = self._session.rundir
        older = states_of(rundir.commit(journal, self._config.keep_commits)[1:])
        # Deleted only now that no journal names it.
        self._weights.discard_obsolete([one for one in (journal["weights"], best["weights"], *weights_of(older)) if one])
        activations = (journal["activations"], *(state.activations for state in older))
        named = {folder for one in activations for folder in one.values()}
        # Only what a commit has named: other stores are being written for the next one meanwhile.
        for folder in self._named - named:
            remove_folder(self.activations / folder)
        self._named = named
        disk.commit_point("discarded")
        limit = self._config.max_disk
        if limit is not None and journal["stage"] != "done" and (taken := rundir.disk_bytes()) > limit:
            raise DiskError(f"the run takes {format_bytes(taken)} on disk, above --max-disk {format_bytes(limit)}; give more")
