"""The data flow of a traced model: which values are alive at each point of its graph, and so where it can be cut.

The graph is run on fake tensors, which have shapes but no values, at two batch sizes and in both modes, and every value, and every
storage that an operation changes in place, is recorded.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from lowmem_pnn.capture.dispatch_modes import storages_of, without_addresses
from lowmem_pnn.capture.fake_model import ModelRun, run_model
from lowmem_pnn.capture.opening import (
    LARGE_ACTIVATION_BYTES,
    LARGE_SHARE,
    chains_of_blocks,
    depth_of,
    large_blocks,
    opened_blocks,
    parents,
)  # fmt: skip
from lowmem_pnn.capture.recomputed import Recomputed, StandIn
from lowmem_pnn.capture.recording import TraceMismatchError, record, with_constants
from lowmem_pnn.capture.setting import Setting
from lowmem_pnn.capture.tracer import Trace, UncutError, trace
from lowmem_pnn.errors import CaptureError
from lowmem_pnn.model.call_form import OutputForm, TensorSpec
from lowmem_pnn.model.copies import copy_structure

MAX_TENSORS = 64
"""The most tensors that a boundary may have."""

# A piece whose whole is at most so many times as large crosses a cut as the whole.
_MOST_OF_WHOLE = 4

_MISMATCH = "its forward does something else where it is traced"
_NORM_CLASS = re.compile(r"norm(\dd)?$", re.IGNORECASE)
# Functions with weights that stay in the layer of the operation before them.
_ATTACHED_FUNCTIONS = {
    F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm, F.prelu, torch.batch_norm, torch.layer_norm,
    torch.group_norm, torch.instance_norm, torch.rms_norm, torch.prelu,
}  # fmt: skip


class _Constant(nn.Module):
    """A tensor that is no parameter and no buffer, as a module: it follows the layer's input to its device, and into a fake mode."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, like: Tensor) -> Tensor:
        value = like.fake_mode.from_tensor(self.value) if isinstance(like, FakeTensor) else self.value
        return value.to(like.device)


def trace_and_flow(model: nn.Module, setting: Setting, runs: Sequence[ModelRun], closed: Mapping[str, str]) -> "DataFlow":
    """Trace a model, and open what makes more than a small share of it, as far as its trace does what the model does.

    Args:
        model: the user's model.
        setting: how it is called, and on what.
        runs: runs of the model on fake tensors, of two batch sizes, and in both modes; the first one's batch is not 1.
        closed: modules that are not opened, with the reason.

    Raises:
        UncutError: its own forward cannot be traced.
    """
    base, made, stopped = chains_of_blocks(model), runs[0].made, dict(closed)
    least = max(LARGE_SHARE * made[""], LARGE_ACTIVATION_BYTES * runs[0].setting.batch)
    blocks = large_blocks(model, base, {name for name, size in made.items() if size > least})
    while True:
        traced = trace(model, setting, base | blocks, stopped, all(run.output.is_tensor for run in runs))
        stopped = dict(traced.stopped)
        try:
            flow = DataFlow(model, traced, runs, (blocks | opened_blocks(model, base)) & traced.opened)
            _check_other_batches(model, traced, setting)
        except TraceMismatchError as error:
            if not error.owner:
                raise UncutError(model, _MISMATCH) from error
            stopped[error.owner] = _MISMATCH
        else:
            return flow


def _check_other_batches(model: nn.Module, traced: Trace, setting: Setting) -> None:
    """Compare the trace at more batch sizes, where the forward decides something by the number of samples."""
    sizes = [(1, False), (max([7, *setting.batches]), True)]
    sizes += [(batch, mode) for batch in sorted(traced.otherwise) for mode in (True, False)]
    for batch, training in dict.fromkeys(sizes) if traced.asked_of_batch else ():
        try:
            run = run_model(model, replace(setting, batch=batch, training=training))
        except CaptureError:  # the model does not take such a batch
            continue
        try:
            record(model, traced, run)
        except TraceMismatchError as error:
            owner = max(traced.asked_of_batch, key=depth_of)
            if not owner:
                raise UncutError(
                    model, f"its forward decides something by the number of samples, and does otherwise with {batch}"
                ) from error
            raise TraceMismatchError(str(error), owner) from error


def check_returned(title: str, form: OutputForm, returned: Sequence[tuple[Sequence[int], torch.dtype]], batch: int) -> None:
    """Refuse what nothing can be learnt from.

    Args:
        title: what to call the model.
        form: what it returns beside its tensors.
        returned: shapes and types of the tensors that it returns.
        batch: number of samples.

    Raises:
        CaptureError: there is no tensor, none of a type that has gradients, or one whose first axis is not the batch.
    """
    if not returned:
        raise CaptureError(f"{title} returns {form}, in which there is no tensor; return the tensor to train on")
    for name, (shape, _) in zip(form.names, returned, strict=True):
        if name == "loss" and not shape:
            raise CaptureError(
                f"{title} returns its own loss, one number for a batch: leave what it makes it of (labels) out of its inputs, and give the loss "
                "as a function of its outputs and the targets (loss=, --loss file.py:function)"
            )
        if not shape or shape[0] != batch:
            raise CaptureError(
                f"{title} returns a tensor{f' {name!r}' if name else ''} of shape {tuple(shape)} for a batch of {batch}; its first axis "
                "must be the batch"
            )
    if not any(dtype.is_floating_point for _, dtype in returned):
        raise CaptureError(
            f"{title} returns a tensor of type {str(returned[0][1]).removeprefix('torch.')}, from which no gradient comes; return the "
            "scores themselves"
        )


def _is_piece(tensor: Tensor) -> bool:
    """Decide whether a tensor is a large piece of another one, with gaps between its rows."""
    sizes = [(stride, length) for stride, length in zip(tensor.stride(), tensor.shape, strict=True) if length > 1]
    # Without gaps each stride is the product of the axes inside of it; one of 0 repeats a value.
    inside = 1
    for stride, length in sorted(sizes):
        if stride != inside:
            return stride > 0 and tensor.untyped_storage().nbytes() <= _MOST_OF_WHOLE * tensor.nbytes
        inside *= length
    return False


class DataFlow:
    """The values that are alive at each point of a traced graph, and so its cuts and its layers.

    Args:
        model: the traced model.
        traced: its trace.
        runs: runs of the model on fake tensors, of two batch sizes, and in both modes; the first one's batch is not 1.
        blocks: modules that are opened although each is one block.

    Raises:
        CaptureError: the trace does other operations than the model, or the model returns other things than tensors of the same batch.
    """

    is_whole = False

    def __init__(self, model: nn.Module, traced: Trace, runs: Sequence[ModelRun], blocks: Collection[str] = ()) -> None:
        self._traced, self._blocks = traced, blocks
        self.opened, self.stopped = traced.opened, traced.stopped
        self.output = traced.output or runs[0].output
        self._weights_of: dict[fx.Node, dict[str, nn.Parameter]] = {}
        self._recordings = [record(model, traced, run) for run in runs]
        self._by_values = traced.calls_and_after(frozenset[str]().union(*(run.asking for run in runs)))
        self._error_prefix = f"model {type(model).__name__}"
        self._root = with_constants(copy_structure(model), traced)
        self._inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
        [self._output] = [node for node in traced.graph.nodes if node.op == "output"]
        self._recomputed = Recomputed(self._root, traced, self._recordings, runs)
        self._steps = [
            node
            for node in traced.graph.nodes
            if node.op.startswith("call_") and not traced.only_fetches(node) and node not in self._recomputed
        ]
        self._position = {**dict.fromkeys(self._inputs, -1), **{node: index for index, node in enumerate(self._steps)}}
        self._last_use = dict(self._position)
        for user in [*self._steps, self._output]:
            for source in user.all_input_nodes:
                for node in self._recomputed.inputs_of(source) if source in self._recomputed else [source]:
                    if node in self._last_use:
                        self._last_use[node] = self._position.get(user, len(self._steps))
        self._results = self._checked_output()
        self.cuts = self._find_cuts()

    def boundaries(self, cuts: Sequence[int]) -> list[list[TensorSpec]]:
        """Return what the tensors before the first layer are, those between layers, and those after the last.

        Args:
            cuts: where to cut, of `cuts`.
        """
        return [[self._spec(node) for node in live] for live in self._live(cuts)]

    def layers(self, cuts: Sequence[int]) -> list[tuple[str, fx.GraphModule, str]]:
        """Make a module of the operations between two cuts, name it, and hash what it did in all recordings, for all cuts in order.

        Args:
            cuts: where to cut, of `cuts`.
        """
        starts, stops, live = [0, *cuts], [*cuts, len(self._steps)], self._live(cuts)
        seen: Counter[str] = Counter()
        layers = []
        for start, stop, before, after in zip(starts, stops, live[:-1], live[1:], strict=True):
            name = self._name(start, stop)
            seen[name] += 1
            unique = name if seen[name] == 1 else f"{name}#{seen[name]}"
            steps = self._steps[start:stop]
            layers.append((unique, self._build(steps, before, after), self._operations(steps)))
        return layers

    def _operations(self, steps: Sequence[fx.Node]) -> str:
        done = hashlib.sha256()
        for recording in self._recordings:
            for node in steps:
                done.update(without_addresses(recording.operations.get(node, "")).encode())
        return done.hexdigest()

    def cuts_between_blocks(self) -> list[int]:
        """Return the cuts but those inside of a block across which several tensors flow."""
        return [cut for cut in self.cuts if len(self._alive_at(cut)) == 1 or not self._inside_block(cut)]

    def _live(self, cuts: Sequence[int]) -> list[list[fx.Node]]:
        return [self._inputs, *(self._alive_at(cut) for cut in cuts), self._results]

    def _inside_block(self, cut: int) -> bool:
        """Decide whether a cut parts the operations of one block that was opened for being large."""
        before, after = (
            {name for node in steps if self._weights(node) for name in self._modules_of(node)}
            for steps in (self._steps[:cut], self._steps[cut:])
        )
        return any(name in before and name in after for name in self._blocks)

    def _modules_of(self, node: fx.Node) -> list[str]:
        """Return the names of the opened modules that a node belongs to, the innermost first."""
        owner = str(node.meta["owner"])
        return [owner, *parents(owner)]

    def _checked_output(self) -> list[fx.Node]:
        """Return the nodes of the tensors that the model returns."""
        results, form = self._output.args[0], self.output
        assert isinstance(results, tuple)
        for recording in self._recordings:
            values = [recording.values[result] if isinstance(result, fx.Node) else result for result in results]
            for name, value in zip(form.names, values, strict=True):
                where = f" {name!r}" if name else ""
                if not isinstance(value, Tensor):
                    raise CaptureError(
                        f"{self._error_prefix} returns{where} a {type(value).__name__} that depends on its input; return tensors"
                    )
            check_returned(self._error_prefix, form, [(value.shape, value.dtype) for value in values], recording.batch)
        for result in results:
            if self._traced.only_fetches(result) or self._recomputed.is_of_sizes(result):
                raise CaptureError(f"{self._error_prefix} returns {result.target!r}, which does not depend on its input")
        return list(results)

    def _find_cuts(self) -> list[int]:
        candidates = [position for position, node in enumerate(self._steps) if self._starts_layer(node)]
        # Operations before the first weights belong to the first layer, which begins at the model's input.
        return [self._before_pieces(position) for position in candidates[1:] if self._can_cut(position)]

    def _before_pieces(self, cut: int) -> int:
        """Return the place of a cut, moved before the operations that cut pieces out of a tensor.

        A piece is stored without the gaps between its rows, and kernels may round otherwise with another layout. It is left where the whole
        tensor is much larger, as all tokens are beside a class token.
        """
        place = cut
        while self._has_gaps(place) and place > 1 and not self._weights(self._steps[place - 1]):
            place -= 1
        return place if place < cut and not self._has_gaps(place) and self._can_cut(place) else cut

    def _has_gaps(self, cut: int) -> bool:
        values = (self._recordings[0].values[node] for node in self._alive_at(cut))
        return any(_is_piece(value) for value in values if isinstance(value, Tensor) and value.is_floating_point())

    def _starts_layer(self, node: fx.Node) -> bool:
        if not self._weights(node):
            return False
        if node.op != "call_module":
            # Weights that are repeated for each sample, as class tokens are, belong to the layer before them.
            is_repeated = any(map(self._recomputed.is_of_sizes, node.all_input_nodes)) and all(
                source.op == "get_attr" or self._recomputed.is_of_sizes(source) for source in node.all_input_nodes
            )
            return node.target not in _ATTACHED_FUNCTIONS and not is_repeated
        module = self._root.get_submodule(str(node.target))
        is_attached = isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU))
        is_norm = _NORM_CLASS.search(type(module).__name__) is not None and not list(module.children())
        return not is_attached and not is_norm

    def _weights(self, node: fx.Node) -> dict[str, nn.Parameter]:
        """Return the parameters that a node uses, its module's or its arguments."""
        if node in self._weights_of:
            return self._weights_of[node]
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
        self._weights_of[node] = weights
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
            if not all(map(recording.can_cross, values)):
                return False
            storages = storages_of(values)
            if any(recording.writes[node] & storages for node in self._steps[cut:]):
                return False
            specs.add(tuple((value.shape[1:], value.dtype) for value in values))
        return len(specs) == 1

    def _spec(self, node: fx.Node) -> TensorSpec:
        value = self._recordings[0].values[node]
        return TensorSpec(tuple(value.shape[1:]), value.dtype, value.requires_grad or node in self._by_values)

    def _name(self, start: int, stop: int) -> str:
        steps = self._steps[start:stop]
        for node in steps:
            weights = self._weights(node)
            if weights:
                name = str(node.target) if node.op == "call_module" else next(iter(weights))
                # A block that was opened, and is whole again in this layer, gives it its name.
                rest = [*self._steps[:start], *self._steps[stop:]]
                elsewhere = {module for other in rest if self._weights(other) for module in self._modules_of(other)}
                whole = [module for module in self._modules_of(node) if module in self._blocks and module not in elsewhere]
                return whole[-1] if whole else name
        modules = [str(node.target) for node in steps if node.op == "call_module"]
        return (modules or [node.name for node in steps] or [self._inputs[0].name])[0]

    def _build(self, steps: list[fx.Node], before: list[fx.Node], after: list[fx.Node]) -> fx.GraphModule:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in before}
        anchor = copies[before[0]]
        for source in self._inputs:
            if source in before and any(
                recording.writes[node] & storages_of(recording.values[source]) for recording in self._recordings for node in steps
            ):
                # A model may change its input in place; the input here may be a buffer that is read again.
                copies[source] = graph.call_method("clone", (copies[source],))

        def fetch(node: fx.Node) -> fx.Node:
            if node not in copies:
                if node.op == "get_attr" and node.target in self._traced.constants:
                    module_name = f"_lowmem_constant_{node.name}"
                    if not hasattr(self._root, module_name):
                        self._root.add_module(module_name, _Constant(self._traced.constants[str(node.target)]))
                    copies[node] = graph.create_node("call_module", module_name, (anchor,))
                elif node in self._recomputed.of_batch:
                    of_device = node.target is getattr
                    copies[node] = (
                        graph.call_function(getattr, (anchor, "device")) if of_device else graph.call_method("size", (anchor, 0))
                    )
                else:
                    stand_ins = self._recomputed.stand_ins.get(node, {})
                    copies[node] = graph.node_copy(
                        node, lambda source: stand_in(source, stand_ins[source]) if source in stand_ins else fetch(source)
                    )
            return copies[node]

        def stand_in(source: fx.Node, module: StandIn) -> fx.Node:
            if source in copies:
                return copies[source]
            name = f"_lowmem_stand_in_{source.name}"
            if not hasattr(self._root, name):
                self._root.add_module(name, module)
            return graph.create_node("call_module", name, (anchor,))

        for node in steps:
            fetch(node)
        graph.output(tuple(fetch(node) for node in after))
        return fx.GraphModule(self._root, graph)
