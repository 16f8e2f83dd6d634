"""Recordings of a traced model: its graph, run on fake tensors as the model was run, with every value and every change in place."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from lowmem_pnn.capture.dispatch_modes import OperationLog, tensors_in, without_values
from lowmem_pnn.capture.fake_model import ModelRun, explain, run_model
from lowmem_pnn.capture.setting import Fakes
from lowmem_pnn.capture.tracer import Trace
from lowmem_pnn.errors import CaptureError


@dataclass
class Recording:
    """Values and in-place changes of a run on fake tensors, by node."""

    batch: int
    values: dict[fx.Node, Any] = field(default_factory=dict)
    writes: dict[fx.Node, set[int]] = field(default_factory=dict)
    """Storages that the node changed in place, also those that are freed by now."""

    draws: set[fx.Node] = field(default_factory=set)
    """Nodes that drew random numbers."""

    reads: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    """Nodes whose values the node reads; it may ask those of its other sources for their shapes and types."""

    first_operation: dict[fx.Node, int] = field(default_factory=dict)
    """How many operations there were before the node."""

    operations: dict[fx.Node, str] = field(default_factory=dict)
    """What the node does: its operations on samples and weights, as text."""

    def can_cross(self, value: Any) -> bool:
        """Decide whether a value may cross a cut: a tensor with the batch on axis 0, not complex, as its gradient would be too."""
        has_batch = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.batch
        return has_batch and not value.is_complex()


class TraceMismatchError(CaptureError):
    """The trace does something else than the model; in which opened module is known."""

    def __init__(self, message: str, owner: str) -> None:
        super().__init__(message)
        self.owner = owner


def changes_from_call_to_call(model: nn.Module) -> str:
    """Return the error of a model that does something else each time it is called."""
    return (
        f"forward of model {type(model).__name__} does something else each time it is called on the same samples, by what is outside of "
        "its modules (a global, a file, the time); such state cannot be kept with a run"
    )


class _RecordingInterpreter(fx.Interpreter):
    """An interpreter that runs a graph node by node and keeps every value, so that no storage's identity is used twice."""

    def __init__(self, root: nn.Module, graph: fx.Graph, recording: Recording, log: OperationLog, error_prefix: str) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False  # it would be added to the text of our errors
        self._recording, self._log, self._error_prefix = recording, log, error_prefix

    def run_node(self, n: fx.Node) -> Any:
        self._log.written_storages, self._log.taken = set(), {}
        draws = self._log.draws
        self._recording.first_operation[n] = len(self._log.entries)
        try:
            value = super().run_node(n)
        except Exception as error:  # whatever a user's module raises on a shape it does not take
            message = f"{self._error_prefix}, at {str(n.target)!r}: {explain(error)}"
            raise TraceMismatchError(message, str(n.meta["owner"])) from error
        self._recording.operations[n] = repr(self._log.entries[self._recording.first_operation[n] :])
        self._recording.values[n], self._recording.writes[n] = value, self._log.written_storages
        if self._log.draws > draws:
            self._recording.draws.add(n)
        seen = self._log.taken.keys() | set(map(id, tensors_in(value)))
        self._recording.reads[n] = {source for source in n.all_input_nodes if self._is_read(source, seen)}
        return value

    def _is_read(self, source: fx.Node, seen: set[int]) -> bool:
        """Decide whether a tensor of a source is among what operations have taken; a source that is no tensor is read."""
        value = self._recording.values[source]
        return any(id(tensor) in seen for tensor in tensors_in(value)) or not isinstance(value, Tensor)


def record(model: nn.Module, traced: Trace, run: ModelRun) -> Recording:
    """Run the traced graph on fake tensors as the model was run; it must do the same operations.

    Args:
        model: the traced model.
        traced: its trace.
        run: what the model did.

    Raises:
        TraceMismatchError: it does others.
    """
    setting = run.setting
    recording = Recording(setting.batch)

    def run_graph(fakes: Fakes, log: OperationLog) -> None:
        root = with_constants(fakes.root, traced, setting.training)
        _RecordingInterpreter(root, traced.graph, recording, log, setting.error_prefix(model)).run(*fakes.samples)

    traced_log = setting.log(model, run_graph)
    if traced_log != run.operations:
        again = run_model(model, setting).operations
        if again != run.operations:
            if without_values(again) == without_values(run.operations) == without_values(traced_log):
                return recording  # a number from outside, which the comparison before training finds
            raise CaptureError(changes_from_call_to_call(model))
        # A forward can tell proxies from tensors: by isinstance(x, Tensor), for one, and then silently do something else.
        pairs = enumerate(zip(traced_log, run.operations, strict=False))
        step = next((step for step, (one, other) in pairs if one != other), min(len(traced_log), len(run.operations)))
        names = [str(log[step][0]) if step < len(log) else "nothing" for log in (run.operations, traced_log)]
        owners = [str(node.meta["owner"]) for node, first in recording.first_operation.items() if first <= step]
        raise TraceMismatchError(
            f"in {setting.mode_text} mode {type(model).__name__} does {names[0]} as operation {step}, where its trace does {names[1]}",
            owners[-1],
        )
    return recording


def with_constants(root: nn.Module, traced: Trace, training: bool = True) -> nn.Module:
    """Add to a copy of the model the constants that the trace refers to, those of a mode where they depend on it.

    Args:
        root: the copy.
        traced: the trace.
        training: whether those of train mode.
    """
    for target, tensor in traced.constants.items():
        path, _, attribute = target.rpartition(".")
        setattr(root.get_submodule(path), attribute, tensor)
    for target, module in traced.mode_constants.items():
        module.train(training)
        root.add_module(target, module)
    return root
