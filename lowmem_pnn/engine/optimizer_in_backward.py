"""Optimizer in backward: steps each layer as soon as its gradients are complete, so that one layer's gradients are in memory at a time.

    backward   layer 3 ---> layer 2 ---> layer 1
                     |            |            |
                 step of 3    step of 2    step of 1      the weights move, and the gradients are freed

That is so where a batch goes through at once; the gradients of several micro-batches add up, and are complete only at the end. Layers
step from the last to the first (layers that go back one by one, each from a loss of its own, from the first to the last), whatever
order their gradients come in, so that what a step needs can be prefetched. A step inside backward is that of LOMO (Lv et al. 2023,
arXiv 2306.09782), with any optimizer.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType

from torch import nn
from torch.utils.hooks import RemovableHandle

from lowmem_pnn.model.layer import Layer

Groups = Sequence[Sequence[str]]
"""Names of parameters, those of a layer together, the first layer's first; each name once."""


class OptimizerInBackward:
    """Steps each group of parameters when its gradients are complete: in a `with` during backward, and in `finish` after it.

    Args:
        groups: names of all parameters that learn, by layer.
        parameters: the parameters by name.
        after_backward: names whose gradients are complete only after backward; a group with one of them steps after its end.
        step_fn: steps the group with a number, and frees its gradients.
        at_once: whether the other groups step during backward; else none does before its end, in the same order.
        per_layer_loss: whether the first layer goes back before the second one runs forward.
    """

    def __init__(
        self,
        groups: Groups,
        parameters: Mapping[str, nn.Parameter],
        after_backward: Collection[str],
        step_fn: Callable[[int], None],
        *,
        at_once: bool,
        per_layer_loss: bool = False,
    ) -> None:
        self._groups = groups
        self._parameters = parameters
        self._step_fn = step_fn
        self._order = step_order(groups, after_backward, per_layer_loss=per_layer_loss)
        self._in_backward = [number for number in self._order if at_once and set(after_backward).isdisjoint(groups[number])]
        self._num_missing = [len(names) for names in groups]
        self._num_stepped = 0
        self._hooks: list[RemovableHandle] = []

    @property
    def stepped(self) -> frozenset[str]:
        """Names of the parameters that have been stepped."""
        return frozenset(name for number in self._order[: self._num_stepped] for name in self._groups[number])

    def __enter__(self) -> "OptimizerInBackward":
        for number in self._in_backward:
            for name in self._groups[number]:
                parameter = self._parameters[name]
                if not parameter.requires_grad:
                    continue  # another forward has left it so: if this one does not, its group steps after backward
                hook = parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._note_gradient(number))
                self._hooks.append(hook)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def finish(self) -> None:
        """Step the groups that are left, in order, after backward."""
        for number in self._order[self._num_stepped :]:
            self._step(number)

    def _note_gradient(self, number: int) -> None:
        """A gradient of a group is complete: step the groups whose turn it is and that miss none."""
        self._num_missing[number] -= 1
        assert self._num_missing[number] >= 0, "a gradient came twice, and the weight had been stepped"
        while self._num_stepped < len(self._in_backward) and not self._num_missing[self._in_backward[self._num_stepped]]:
            self._step(self._in_backward[self._num_stepped])

    def _step(self, number: int) -> None:
        self._num_stepped += 1  # before it is done: a step that fails in the middle has moved weights
        self._step_fn(number)


def step_order(groups: Groups, after_backward: Collection[str], *, per_layer_loss: bool = False) -> list[int]:
    """Return the numbers of groups in the order in which they step, those that step after backward at the end.

    Args:
        groups: names of parameters by layer, the first layer's first.
        after_backward: names of the parameters whose gradients are complete only after backward.
        per_layer_loss: from the first layer to the last, instead of the other way.

    Example:
        >>> step_order([["a"], ["b", "c"], ["d"]], after_backward={"c"})
        [2, 0, 1]
    """
    numbers = range(len(groups)) if per_layer_loss else reversed(range(len(groups)))
    # Sorting keeps the order of those that are equal.
    return sorted(numbers, key=lambda number: not set(after_backward).isdisjoint(groups[number]))


def after_backward_names(
    layers: Sequence[Layer], owner_of: Callable[[str], str], *, per_layer_loss: bool, in_chunks: bool
) -> frozenset[str]:
    """Return the parameters whose gradients come from more than one backward of a micro-batch, or whose values it takes to its end.

    Args:
        layers: layers of a partition.
        owner_of: returns the name under which a tensor is stored, of the several that it may have.
        per_layer_loss: whether each layer goes back from a loss of its own; the gradient of a tensor that several of them share is
            then complete only after the last.
        in_chunks: whether the last layer goes back chunk by chunk.
    """
    own = [{owner_of(alias) for alias in layer.parameters()} for layer in layers]
    names_after = set(own[-1]) if in_chunks else set()
    names_after |= {owner_of(alias) for layer in layers for alias in layer.detached}
    if per_layer_loss:
        seen: set[str] = set()
        for names in own:
            names_after |= seen & names
            seen |= names
    return frozenset(names_after)
