"""A model that cannot be cut, as a chain of one layer that runs the model's own code."""

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from lowmem_pnn.capture.dataflow import check_returned
from lowmem_pnn.capture.dispatch_modes import without_addresses
from lowmem_pnn.capture.fake_model import ModelRun, run_model
from lowmem_pnn.capture.recording import changes_from_call_to_call
from lowmem_pnn.capture.setting import Setting
from lowmem_pnn.errors import CaptureError
from lowmem_pnn.model.call_form import CallForm, OutputForm, TensorSpec
from lowmem_pnn.model.copies import copy_structure

_CALLS = 3


class WholeModel(nn.Module):
    """A model as a module from tensors to a tuple of tensors, with the model's own names of parameters, buffers and modules.

    Args:
        model: a copy of the user's model. All attributes are shared with it: what is set here is set there.
        form: how the tensors are handed to it.
    """

    __slots__ = ("_form", "_model")  # beside the attributes, which are the model's
    _form: CallForm
    _model: nn.Module

    def __init__(self, model: nn.Module, form: CallForm) -> None:
        object.__setattr__(self, "__dict__", vars(model))
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_form", form)

    # A property, which an attribute of that name of the model's does not hide.
    forward: Any = property(lambda self: self._run)

    # Hooks, which are attributes too, run when the model is called.
    def __call__(self, *tensors: Any) -> Any:
        """Run the model."""
        return self._run(*tensors)

    def _run(self, *tensors: Any) -> Any:
        return OutputForm.of(self._form.call(self._model, tensors))[1]


class WholeFlow:
    """The data flow of a model that is one layer; to be asked as `DataFlow` is.

    Args:
        model: the user's model.
        setting: how it is called, and on what.
        runs: runs of the model on fake tensors, of two batch sizes, and in both modes.
        reason: why it cannot be cut, as in "its forward ...".

    Raises:
        CaptureError: it returns other things than tensors of the same batch, or other things in eval than in train mode, or does something
            else each time.
    """

    cuts: Sequence[int] = ()
    is_whole = True

    def __init__(self, model: nn.Module, setting: Setting, runs: Sequence[ModelRun], reason: str) -> None:
        title = f"model {type(model).__name__}"
        self._model, self._setting, self._runs = model, setting, runs
        for run in runs:
            check_returned(title, run.output, run.returned, run.setting.batch)
            if run.output != runs[0].output:
                raise CaptureError(
                    f"{title} returns {runs[0].output} in train mode and {run.output} in eval mode; wrap it in a module that returns the same "
                    "in both"
                )
        # Scripted functions do other operations in their first calls, in which they are looked at.
        logs = [runs[0].operations, *(run_model(model, runs[0].setting).operations for _ in range(_CALLS))]
        if all(log != following for log, following in pairwise(logs)):
            raise CaptureError(changes_from_call_to_call(model))
        self.output, self.stopped = runs[0].output, {"": reason}
        done = [logs[-1], *(run_model(model, run.setting).operations for run in runs[1:])]
        self._done = hashlib.sha256(without_addresses(repr(done)).encode()).hexdigest()

    def boundaries(self, cuts: Sequence[int]) -> list[list[TensorSpec]]:
        """Return what the tensors are that go in, and those that come out."""
        outputs = [TensorSpec(tuple(shape[1:]), dtype) for shape, dtype in self._runs[0].returned]
        return [list(self._setting.specs), outputs]

    def layers(self, cuts: Sequence[int]) -> list[tuple[str, nn.Module, str]]:
        """Return the one layer: its name, its module, and a hash of its operations."""
        return [("model", WholeModel(copy_structure(self._model), self._setting.form), self._done)]

    def cuts_between_blocks(self) -> Sequence[int]:
        """Return no cuts."""
        return self.cuts
