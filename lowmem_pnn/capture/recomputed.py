"""Recomputed values: what each layer that uses it computes for itself, from sizes, constants and the model's integer inputs.

Masks, position numbers and rotary tables are such values. They do not cross a boundary: what crosses is, at most, the input that they
are made of. Where an operation asks a value only for its shape and type, an empty tensor stands in for it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lowmem_pnn.capture.dispatch_modes import storages_of
from lowmem_pnn.capture.fake_model import ModelRun
from lowmem_pnn.capture.recording import Recording
from lowmem_pnn.capture.tracer import Trace

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)


class StandIn(nn.Module):
    """A tensor of zeros in the place of one whose values are not read.

    Args:
        shape: sizes of its axes: a number, or a tuple of one number, of which there are so many for each sample.
        dtype: its type.
    """

    def __init__(self, shape: Sequence[int | tuple[int]], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = tuple(shape), dtype

    def forward(self, anchor: Tensor) -> Tensor:
        """Return the tensor.

        Args:
            anchor: tensor that has the batch on axis 0, and is on the device.
        """
        sizes = [size[0] * anchor.shape[0] if isinstance(size, tuple) else size for size in self.shape]
        return anchor.new_zeros((), dtype=self.dtype).expand(sizes)


class Recomputed:
    """The nodes of a trace whose values every layer that uses them computes for itself.

    Args:
        root: copy of the model, with the trace's constants.
        traced: the trace.
        recordings: its values on fake tensors, of two batch sizes at least.
        runs: what the model did.
    """

    of_batch: set[fx.Node]
    """Nodes that are the number of samples, or the device: what every tensor of a boundary tells."""

    stand_ins: dict[fx.Node, dict[fx.Node, StandIn]]
    """For each node that is recomputed, what stands in for sources whose values it does not read."""

    def __init__(self, root: nn.Module, traced: Trace, recordings: Sequence[Recording], runs: Sequence[ModelRun]) -> None:
        self._root, self._traced, self._recordings = root, traced, recordings
        self._written = frozenset[int]().union(*(storages for recording in recordings for storages in recording.writes.values()))
        self._changed = frozenset[str]().union(*(run.changed for run in runs))
        self._stateful = {name for run in runs for name, _ in (*run.kept, *run.left)}
        self.of_batch = {node for node in traced.graph.nodes if self._is_of_batch(node)}
        self._inputs: dict[fx.Node, frozenset[fx.Node]] = dict.fromkeys(self.of_batch, frozenset())
        self.stand_ins = {}
        for node in traced.graph.nodes:
            if node not in self._inputs and self._can_be_recomputed(node):
                self._add(node)

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._inputs

    def inputs_of(self, node: fx.Node) -> Iterable[fx.Node]:
        """Return the inputs of the model that a node is computed from; none where that takes sizes and constants alone.

        Args:
            node: node that is recomputed.
        """
        return self._inputs[node]

    def is_of_sizes(self, node: fx.Node) -> bool:
        """Decide whether a node is computed from sizes and constants alone."""
        return node in self._inputs and not self._inputs[node]

    def _is_of_batch(self, node: fx.Node) -> bool:
        if node.op == "call_function" and node.target is getattr and node.args[1] == "device":
            return all(isinstance(recording.values[node], torch.device) for recording in self._recordings)
        is_size = node.op == "call_method" and node.target == "size" and len(node.args) == 2
        return is_size and all(recording.values[node] == recording.batch for recording in self._recordings)

    def _can_be_recomputed(self, node: fx.Node) -> bool:
        """Decide whether a node does the same wherever it is computed, given the same values."""
        if node.op == "call_module":
            if self._traced.only_fetches(node):
                return False
            module, path = self._root.get_submodule(str(node.target)), f"{node.target}."
            tensors = {path + name for name, _ in (*module.named_parameters(), *module.named_buffers())}
            modules = {(path + name).rstrip(".") for name, _ in module.named_modules()}
            if any(True for _ in module.parameters()) or tensors & self._changed or modules & self._stateful:
                return False
        elif node.op not in ("call_function", "call_method") or not node.all_input_nodes:
            return False
        return all(
            node not in recording.draws and not recording.writes[node] and self._is_untouched(recording.values[node])
            for recording in self._recordings
        )

    def _is_untouched(self, value: Any) -> bool:
        """Decide whether a value is plain, or tensors that nothing changes in place and no gradient comes to."""
        leaves = pytree.tree_leaves(value)
        if not all(isinstance(leaf, (Tensor, slice, *_PLAIN)) for leaf in leaves):
            return False
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return not any(tensor.requires_grad for tensor in tensors) and not storages_of(tensors) & self._written

    def _add(self, node: fx.Node) -> None:
        """Add a node, if all that it reads is at hand in every layer."""
        inputs: frozenset[fx.Node] = frozenset()
        stand_ins: dict[fx.Node, StandIn] = {}
        for source in node.all_input_nodes:
            own = self._made_of(source)
            if own is None or own:
                is_read = any(source in recording.reads[node] for recording in self._recordings)
                if not is_read and (shape := self._shape_of(source)) is not None:
                    stand_ins[source] = StandIn(shape, self._recordings[0].values[source].dtype)
                    continue
            if own is None:
                return
            inputs |= own
        self._inputs[node], self.stand_ins[node] = inputs, stand_ins

    def _made_of(self, source: fx.Node) -> frozenset[fx.Node] | None:
        """Return the inputs that a value is made of; None where it is made of weights, or of inputs that are no integers."""
        if source in self._inputs:
            return self._inputs[source]
        if not all(self._is_untouched(recording.values[source]) for recording in self._recordings):
            return None
        if source.op == "placeholder":
            value = self._recordings[0].values[source]
            return None if value.is_floating_point() or value.is_complex() else frozenset({source})
        if source.op == "get_attr":
            return None if source.target in self._changed else frozenset()
        return frozenset() if self._traced.only_fetches(source) else None

    def _shape_of(self, source: fx.Node) -> list[int | tuple[int]] | None:
        """Return the shape of a tensor for any number of samples; None where the value is none, or where that is not known."""
        values = [recording.values[source] for recording in self._recordings]
        if not all(isinstance(value, Tensor) and value.dim() == values[0].dim() for value in values):
            return None
        shape: list[int | tuple[int]] = []
        for sizes in zip(*(value.shape for value in values), strict=True):
            per_sample = {size / recording.batch for size, recording in zip(sizes, self._recordings, strict=True)}
            if len(set(sizes)) == 1:
                shape.append(sizes[0])
            elif len(per_sample) == 1 and (number := per_sample.pop()).is_integer():
                shape.append((int(number),))
            else:
                return None
        return shape


def unchanged_buffers(model: nn.Module, runs: Sequence[ModelRun]) -> Mapping[int, str]:
    """Return the buffers that no forward changes, by identity: any number of layers may hold one, each for itself.

    Args:
        model: the user's model.
        runs: what it did.
    """
    changed = frozenset[str]().union(*(run.changed for run in runs))
    names = dict(model.named_buffers(remove_duplicate=False))
    taken = {id(names[name]) for name in changed & names.keys()}
    return {id(buffer): name for name, buffer in names.items() if id(buffer) not in taken}
