"""Vocabulary: the weights of a model, wide beside its blocks, whose gradients need not be in memory as a whole.

The last layer's, if the loss is a cross entropy of its scores (`vocabulary_tiles`), and those of embeddings (`row_gradients`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.model.layer import is_rowwise
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.sweep.row_gradients import embedding_weights
from lowmem_pnn.units import MEBIBYTE
from lowmem_pnn.workload import Workload

LEAST_BYTES = MEBIBYTE
"""Size of a weight from which on its gradient may be made in pieces."""

_MOST_TILE_BYTES = 8 * MEBIBYTE
_LEAST_TILE_BYTES = MEBIBYTE // 4


@dataclass(frozen=True)
class Vocabulary:
    """The wide weights of a chain whose gradients may be made in pieces.

    Args:
        head: name under which the weight of the last layer is stored; None where its gradient is made as a whole, or it does not learn.
        embeddings: names under which weights of embeddings are stored, by the number of the layer.
    """

    head: str | None
    embeddings: Mapping[int, frozenset[str]]

    def of_layer(self, number: int) -> frozenset[str]:
        """Return the names of the embeddings' weights in a layer.

        Args:
            number: number of the layer.
        """
        return self.embeddings.get(number, frozenset())


def vocabulary_of(workload: Workload) -> Vocabulary | None:
    """Return the wide weights of a workload whose gradients may be made in pieces; None where there are none.

    Args:
        workload: model, data and method; of methods of sweeps.
    """
    chain = workload.chain
    if not workload.method.sweeps or workload.config.unfreeze_at is not None or workload.config.precision != "fp32":
        return None
    embeddings: dict[int, frozenset[str]] = {}
    for number, layer in enumerate(chain.layers[:-1]):
        parameters = layer.parameters()
        names = {chain.owner_of(alias) for alias in embedding_weights(layer) if _is_wide(chain, alias, parameters[alias])}
        if names:
            embeddings[number] = frozenset(names)
    users: dict[str, list[int]] = {}
    for number, layer in enumerate(chain.layers):
        for name in {chain.owner_of(alias) for alias in layer.parameters()}:
            users.setdefault(name, []).append(number)
    last = len(chain.layers) - 1
    head = _head(workload)
    if head is not None and not all(head in embeddings.get(number, ()) for number in users[head] if number < last):
        head = None

    def is_taken(name: str) -> bool:
        # By all layers that hold it: else one of them would make a gradient of its size all the same.
        return all(name == head if number == last else name in embeddings.get(number, ()) for number in users[name])

    embeddings = {number: frozenset(filter(is_taken, names)) for number, names in embeddings.items()}
    embeddings = {number: names for number, names in embeddings.items() if names}
    return Vocabulary(head, embeddings) if head is not None or embeddings else None


def tile_rows(budget_bytes: int, rows: int, features: int) -> int:
    """Return how many classes a tile has: neither its scores nor its gradient take more than a small share of the budget.

    Args:
        budget_bytes: the budget.
        rows: rows of inputs that stay in memory.
        features: features of each.
    """
    nbytes = min(max(budget_bytes // 64, _LEAST_TILE_BYTES), _MOST_TILE_BYTES)
    return max(1, nbytes // (4 * max(rows, features)))


def in_pieces(residency: Residency, workload: Workload, plan: Plan) -> frozenset[str]:
    """Return the names of a partition's weights whose gradients are made in pieces, and complete only after backward.

    Args:
        residency: the partition.
        workload: model, data and method.
        plan: plan of the run.
    """
    vocabulary = None if plan.vocabulary_tile is None else vocabulary_of(workload)
    if vocabulary is None:
        return frozenset()
    names = {workload.chain.owner_of(alias) for layer in residency.layers for alias in layer.parameters()}
    taken = frozenset().union(*vocabulary.embeddings.values())
    if plan.vocabulary_tile and residency.layers[-1] is workload.chain.layers[-1]:
        taken |= names  # with the bias
    return taken & names


def head_parameters(parameters: Mapping[str, nn.Parameter]) -> tuple[str, str | None]:
    """Return the names of the weight and of the bias, if it has one, of a layer that is one linear layer.

    Args:
        parameters: parameters of the layer, by name.
    """
    (weight,) = (name for name, one in parameters.items() if one.dim() == 2)
    return weight, next((name for name in parameters if name != weight), None)


def _head(workload: Workload) -> str | None:
    chain, task = workload.chain, workload.task
    layer = chain.layers[-1]
    if task.plain_smoothing is None or not is_rowwise(layer) or layer.compiled is not None or layer.precision.dtype != "fp32":
        return None
    parameters, before, after = layer.parameters(), chain.boundaries[-2], chain.boundaries[-1]
    if len(chain.layers) == 1 or len(before) != 1 or len(after) != 1 or before[0].dtype != torch.float32:
        return None
    if [one.dim() for one in parameters.values()] not in ([2], [2, 1], [1, 2]) or layer.buffers():
        return None
    alias, _ = head_parameters(parameters)
    return chain.owner_of(alias) if _is_wide(chain, alias, parameters[alias]) else None


def _is_wide(chain: Chain, alias: str, weight: nn.Parameter) -> bool:
    return (
        weight.requires_grad
        and weight.dtype == torch.float32
        and weight.nbytes >= LEAST_BYTES
        and not chain.has_hooks(chain.owner_of(alias))
    )
