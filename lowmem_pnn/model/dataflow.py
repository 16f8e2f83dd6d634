"""The data flow of a traced model: which values are alive at each point of its graph, and so where it can be cut.

The graph is run on fake tensors, which have shapes but no values, at two batch sizes and in both modes, and every value, and every
storage that an operation changes in place, is recorded.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from lowmem_pnn.errors import CaptureError
from lowmem_pnn.model.fake_model import ModelRun, OperationLog, explain, run_model, storages_of
from lowmem_pnn.model.tracer import Trace, copy_structure

MAX_TENSORS = 64
"""The most tensors that a boundary may have."""

_NORM_CLASS = re.compile(r"norm(\dd)?$", re.IGNORECASE)
# Functions with weights that stay in the layer of the operation before them.
_ATTACHED_FUNCTIONS = {
    F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm, F.prelu, torch.batch_norm, torch.layer_norm,
    torch.group_norm, torch.instance_norm, torch.rms_norm, torch.prelu,
}  # fmt: skip


@dataclass
class _Recording:
    """Values and in-place changes of a run on fake tensors, by node."""

    batch: int
    values: dict[fx.Node, Any] = field(default_factory=dict)
    writes: dict[fx.Node, set[int]] = field(default_factory=dict)
    """Storages that the node changed in place, also those that are freed by now."""


class _RecordingInterpreter(fx.Interpreter):
    """An interpreter that runs a graph node by node and keeps every value, so that no storage's identity is used twice."""

    def __init__(self, root: nn.Module, graph: fx.Graph, recording: _Recording, log: OperationLog, error_prefix: str) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False  # it would be added to the text of our errors
        self._recording, self._log, self._error_prefix = recording, log, error_prefix

    def run_node(self, n: fx.Node) -> Any:
        self._log.written_storages = set()
        try:
            value = super().run_node(n)
        except Exception as error:  # whatever a user's module raises on a shape it does not take
            raise CaptureError(f"{self._error_prefix}, at {str(n.target)!r}: {explain(error)}") from error
        self._recording.values[n], self._recording.writes[n] = value, self._log.written_storages
        return value


def _record(model: nn.Module, traced: Trace, run: ModelRun) -> _Recording:
    """Run the traced graph on fake tensors as the model was run; it must do the same operations."""
    setting = run.setting
    recording = _Recording(setting.batch)

    def run_graph(root: nn.Module, samples: Tensor, log: OperationLog) -> None:
        root = _with_constants(root, traced, setting.training)
        _RecordingInterpreter(root, traced.graph, recording, log, setting.error_prefix(model)).run(samples)

    traced_log = setting.log(model, run_graph)
    if traced_log != run.operations:
        if run_model(model, setting).operations != run.operations:
            raise CaptureError(
                f"forward of model {type(model).__name__} does something else each time it is called on the same samples, by what is outside of "
                "its modules (a global, a file, the time); such state cannot be kept with a run"
            )
        # A forward can tell proxies from tensors: by isinstance(x, Tensor), for one, and then silently do something else.
        pairs = enumerate(zip(traced_log, run.operations, strict=False))
        step = next((step for step, (one, other) in pairs if one != other), min(len(traced_log), len(run.operations)))
        names = [str(log[step][0]) if step < len(log) else "nothing" for log in (run.operations, traced_log)]
        raise CaptureError(
            f"model {type(model).__name__} cannot be cut into layers: in {setting.mode_text} mode it does {names[0]} as operation "
            f"{step}, where its traced forward does {names[1]}; keep isinstance(x, Tensor) and the like in a module of their own"
        )
    return recording


def _with_constants(root: nn.Module, traced: Trace, training: bool = True) -> nn.Module:
    """Add to a copy of the model the constants that the trace refers to, those of a mode where they depend on it."""
    for target, tensor in traced.constants.items():
        path, _, attribute = target.rpartition(".")
        setattr(root.get_submodule(path), attribute, tensor)
    for target, module in traced.mode_constants.items():
        module.train(training)
        root.add_module(target, module)
    return root


class _Constant(nn.Module):
    """A tensor that is no parameter and no buffer, as a module: it follows the layer's input to its device, and into a fake mode."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, like: Tensor) -> Tensor:
        value = like.fake_mode.from_tensor(self.value) if isinstance(like, FakeTensor) else self.value
        return value.to(like.device)


class DataFlow:
    """The values that are alive at each point of a traced graph, and so its cuts and its layers.

    Args:
        model: the traced model.
        traced: its trace.
        runs: runs of the model on fake tensors, of two batch sizes, and in both modes; the first one's batch is not 1.

    Raises:
        CaptureError: the trace does other operations than the model, or the model does not return one tensor of the same batch.
    """

    def __init__(self, model: nn.Module, traced: Trace, runs: Sequence[ModelRun]) -> None:
        self._traced = traced
        self._recordings = [_record(model, traced, run) for run in runs]
        self._error_prefix = f"model {type(model).__name__}"
        self._root = _with_constants(copy_structure(model), traced)
        self._input = next(node for node in traced.graph.nodes if node.op == "placeholder")
        [self._output] = [node for node in traced.graph.nodes if node.op == "output"]
        self._steps = [node for node in traced.graph.nodes if node.op.startswith("call_") and not traced.only_fetches(node)]
        self._position = {self._input: -1, **{node: index for index, node in enumerate(self._steps)}}
        self._last_use = dict(self._position)
        for user in [*self._steps, self._output]:
            for node in user.all_input_nodes:
                if node in self._last_use:
                    self._last_use[node] = self._position.get(user, len(self._steps))
        self._check_output()
        self._cuts = self._find_cuts()
        self._live = [[self._input], *(self._alive_at(cut) for cut in self._cuts), [self._result]]

    def boundaries(self) -> list[list[tuple[tuple[int, ...], torch.dtype]]]:
        """Return shapes without the batch axis, and types, of the tensors before the first layer, between layers, and after the last."""
        return [[self._spec(node) for node in live] for live in self._live]

    def layers(self) -> list[tuple[str, fx.GraphModule]]:
        """Make a module of the operations between two cuts, and name it, for all cuts in order."""
        starts, stops = [0, *self._cuts], [*self._cuts, len(self._steps)]
        seen: Counter[str] = Counter()
        layers = []
        for start, stop, before, after in zip(starts, stops, self._live[:-1], self._live[1:], strict=True):
            name = self._name(self._steps[start:stop])
            seen[name] += 1
            unique = name if seen[name] == 1 else f"{name}#{seen[name]}"
            layers.append((unique, self._build(self._steps[start:stop], before, after)))
        return layers

    def trained(self) -> set[int]:
        """Return the identities of the parameters that the model's output depends on."""
        needed = {self._output}
        for recording in self._recordings:
            known = storages_of(recording.values[self._input])
            for node in self._steps:
                if recording.writes[node] & known:
                    needed.add(node)  # it changes an earlier value in place, which the output may depend on
                known |= storages_of(recording.values[node])
        stack = list(needed)
        while stack:
            for node in stack.pop().all_input_nodes:
                if node not in needed:
                    needed.add(node)
                    stack.append(node)
        parameters: set[int] = set()
        for node in needed:
            parameters.update(map(id, self._weights(node).values()))
        return parameters

    def _check_output(self) -> None:
        result = self._output.args[0]
        for recording in self._recordings:
            value = recording.values[result] if isinstance(result, fx.Node) else result
            if not isinstance(value, Tensor):
                kind = type(value).__name__.removeprefix("immutable_")
                many = f" of {len(value)}" if isinstance(value, (tuple, list, dict)) else ""
                raise CaptureError(
                    f"{self._error_prefix} returns {kind}{many}, not one tensor; wrap it in a module that returns the tensor to train on"
                )
            if value.dim() == 0 or value.shape[0] != recording.batch:
                raise CaptureError(
                    f"{self._error_prefix} returns a tensor of shape {tuple(value.shape)} for a batch of {recording.batch}; its "
                    "first axis must be the batch"
                )
            if not value.dtype.is_floating_point:
                raise CaptureError(
                    f"{self._error_prefix} returns a tensor of type {str(value.dtype).removeprefix('torch.')}, from which no gradient comes; "
                    "return the scores themselves"
                )
        assert isinstance(result, fx.Node)
        if self._traced.only_fetches(result):
            raise CaptureError(f"{self._error_prefix} returns {result.target!r}, which does not depend on its input")
        self._result = result

    def _find_cuts(self) -> list[int]:
        candidates = [position for position, node in enumerate(self._steps) if self._starts_layer(node)]
        # Operations before the first weights belong to the first layer, which begins at the model's input.
        return [position for position in candidates[1:] if self._can_cut(position)]

    def _starts_layer(self, node: fx.Node) -> bool:
        if not self._weights(node):
            return False
        if node.op != "call_module":
            return node.target not in _ATTACHED_FUNCTIONS
        module = self._root.get_submodule(str(node.target))
        is_attached = isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU))
        is_norm = _NORM_CLASS.search(type(module).__name__) is not None and not list(module.children())
        return not is_attached and not is_norm

    def _weights(self, node: fx.Node) -> dict[str, nn.Parameter]:
        """Return the parameters that a node uses, its module's or its arguments."""
        if node.op == "call_module":
            module = self._root.get_submodule(str(node.target))
            weights = {f"{node.target}.{name}": parameter for name, parameter in module.named_parameters()}
        else:
            weights = {}
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source.target not in self._traced.constants:
                path, _, attribute = str(source.target).rpartition(".")
                value = getattr(self._root.get_submodule(path), attribute)
                if isinstance(value, nn.Parameter):
                    weights[str(source.target)] = value
        return weights

    def _alive_at(self, cut: int) -> list[fx.Node]:
        return [node for node, position in self._position.items() if position < cut <= self._last_use[node]]

    def _can_cut(self, cut: int) -> bool:
        live = self._alive_at(cut)
        if not 0 < len(live) <= MAX_TENSORS:
            return False
        specs = set()
        for recording in self._recordings:
            values = [recording.values[node] for node in live]
            if not all(isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == recording.batch for value in values):
                return False
            storages = storages_of(values)
            if any(recording.writes[node] & storages for node in self._steps[cut:]):
                return False
            specs.add(tuple((value.shape[1:], value.dtype) for value in values))
        return len(specs) == 1

    def _spec(self, node: fx.Node) -> tuple[tuple[int, ...], torch.dtype]:
        value = self._recordings[0].values[node]
        return tuple(value.shape[1:]), value.dtype

    def _name(self, steps: list[fx.Node]) -> str:
        for node in steps:
            weights = self._weights(node)
            if weights:
                return str(node.target) if node.op == "call_module" else next(iter(weights))
        modules = [str(node.target) for node in steps if node.op == "call_module"]
        return (modules or [node.name for node in steps] or [self._input.name])[0]

    def _build(self, steps: list[fx.Node], before: list[fx.Node], after: list[fx.Node]) -> fx.GraphModule:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in before}
        anchor = copies[before[0]]
        if self._input in before and any(
            recording.writes[node] & storages_of(recording.values[self._input])
            for recording in self._recordings
            for node in steps
        ):
            # A model may change its input in place; the input here may be a buffer that is read again.
            copies[self._input] = graph.call_method("clone", (copies[self._input],))

        def fetch(node: fx.Node) -> fx.Node:
            if node not in copies:
                if node.op == "get_attr" and node.target in self._traced.constants:
                    module_name = f"_lowmem_constant_{node.name}"
                    if not hasattr(self._root, module_name):
                        self._root.add_module(module_name, _Constant(self._traced.constants[str(node.target)]))
                    copies[node] = graph.create_node("call_module", module_name, (anchor,))
                else:
                    copies[node] = graph.node_copy(node, fetch)
            return copies[node]

        for node in steps:
            fetch(node)
        graph.output(tuple(fetch(node) for node in after))
        return fx.GraphModule(self._root, graph)
