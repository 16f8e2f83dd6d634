"""Callbacks: what a caller's own code is told while a run goes on."""

from collections.abc import Iterable, Mapping
from typing import Any

from lowmem_pnn.errors import ConfigError


class Callback:
    """Base class of callbacks, which does nothing: override what is of interest.

    A callback only looks on. What it raises ends the run as an error in the caller's own code, and the run can be resumed;
    `lowmem_pnn.errors.Stopped` ends it at its last commit.
    """

    def on_fit_start(self, info: Mapping[str, Any]) -> None:
        """Training begins, or goes on.

        Args:
            info: `workdir`, `method`, `model`, `data`, `partitions`, `resumed` (how often), and `epochs_done` of what is under way.
        """

    def on_step_end(self, info: Mapping[str, Any]) -> None:
        """An optimizer step is done.

        Args:
            info: `action` (`learn`, or `sweep` where all partitions learn together), `partition` (from 0), `epoch` (from 1) and `step`
                (optimizer steps of that partition so far), `loss` of the batch (None if it was left out), `lr`, and `used_bytes`.
        """

    def on_epoch_end(self, info: Mapping[str, Any]) -> None:
        """An epoch of a partition, or of all together, is over and validated.

        Args:
            info: the line of `metrics.jsonl`: `epoch`, `partition`, `train_loss`, `val_loss`, `val_accuracy`, bytes and seconds.
        """

    def on_commit(self, info: Mapping[str, Any]) -> None:
        """A commit has become durable: a resume would go on from there. Told when the next one begins, or at the end.

        Args:
            info: `number` of the commit, and `seconds` of the run at it.
        """

    def on_fit_end(self, info: Mapping[str, Any]) -> None:
        """The run is done, and its result written.

        Args:
            info: what `result.json` says.
        """


def checked_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """Return the callbacks that a caller gave.

    Args:
        callbacks: several; None for none.

    Raises:
        ConfigError: they are none, or something else is among them.

    Example:
        >>> checked_callbacks([Callback])
        Traceback (most recent call last):
        lowmem_pnn.errors.ConfigError: callbacks takes a list of lowmem_pnn.Callback objects, and one is the class Callback; give Callback()
    """
    if callbacks is None:
        return ()
    takes = "callbacks takes a list of lowmem_pnn.Callback objects"
    if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
        raise ConfigError(f"{takes}, and got a single {type(callbacks).__name__}; give callbacks=[...]")
    given = tuple(callbacks)
    for callback in given:
        if isinstance(callback, type):
            raise ConfigError(f"{takes}, and one is the class {callback.__name__}; give {callback.__name__}()")
        if not isinstance(callback, Callback):
            raise ConfigError(f"{takes}, and one is of {type(callback).__name__}; derive it from lowmem_pnn.Callback")
    return given


class Callbacks:
    """All callbacks of a run, told one after the other.

    Args:
        callbacks: the callbacks.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._callbacks = tuple(callbacks)

    def tell(self, event: str, info: Mapping[str, Any]) -> None:
        """Tell all of them of an event.

        Args:
            event: name of the method that is called.
            info: what it is given.
        """
        for callback in self._callbacks:
            getattr(callback, event)(dict(info))  # of its own: one may change it
