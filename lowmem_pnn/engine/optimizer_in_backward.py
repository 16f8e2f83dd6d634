"""OptimizerInBackward: when the gradients of a layer are whole, in the midst of a backward that goes on to the layers before it.

    backward   layer 3 ---> layer 2 ---> layer 1
                     |            |            |
                  act on 3     act on 2     act on 1      the weights step, and the gradients go

So gradients of one layer at a time are in memory, where a batch goes through at once; those of several micro-batches add up, and are
whole only at the end. Layers are acted on from the last to the first (those that go back one by one, from a loss of their own, from
the first to the last), whatever order gradients come in, so that what is needed for them can be read ahead. The step inside backward
is that of LOMO (Lv et al. 2023, arXiv 2306.09782), with any optimizer.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType

from torch import nn
from torch.utils.hooks import RemovableHandle

from lowmem_pnn.model.chain import Layer

Groups = Sequence[Sequence[str]]
"""Names of parameters, those of a layer together, the first layer's first; each name once."""


class OptimizerInBackward:
    """Acts on each group of parameters when their gradients are whole: in a `with` during backward, and in `finish` after it.

    Args:
        groups: of all that learns.
        parameters: by name.
        late: names whose gradients are whole only after backward; a group with one of them waits for its end.
        act: on the group with a number; it drops the gradients.
        at_once: others are acted on during backward; else nothing is before its end, in the same order.
        per_layer_loss: the first layer goes back before the second one runs forward.
    """

    def __init__(
        self,
        groups: Groups,
        parameters: Mapping[str, nn.Parameter],
        late: Collection[str],
        act: Callable[[int], None],
        *,
        at_once: bool,
        per_layer_loss: bool = False,
    ) -> None:
        self._groups = groups
        self._parameters = parameters
        self._act = act
        self._order = step_order(groups, late, per_layer_loss=per_layer_loss)
        self._early = [number for number in self._order if at_once and set(late).isdisjoint(groups[number])]
        self._missing = [len(names) for names in groups]
        self._num_taken = 0
        self._hooks: list[RemovableHandle] = []

    @property
    def taken(self) -> frozenset[str]:
        """Names of the parameters that were acted on."""
        return frozenset(name for number in self._order[: self._num_taken] for name in self._groups[number])

    def __enter__(self) -> "OptimizerInBackward":
        for number in self._early:
            for name in self._groups[number]:
                hook = self._parameters[name].register_post_accumulate_grad_hook(lambda _, number=number: self._arrived(number))
                self._hooks.append(hook)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def finish(self) -> None:
        """Act on what is left, in order: backward is over."""
        for number in self._order[self._num_taken :]:
            self._take(number)

    def _arrived(self, number: int) -> None:
        self._missing[number] -= 1
        assert self._missing[number] >= 0, "a gradient came twice, and the weight had been stepped"
        while self._num_taken < len(self._early) and not self._missing[self._early[self._num_taken]]:
            self._take(self._early[self._num_taken])

    def _take(self, number: int) -> None:
        self._num_taken += 1  # before it is done: what fails in the middle has moved weights
        self._act(number)


def step_order(groups: Groups, late: Collection[str], *, per_layer_loss: bool = False) -> list[int]:
    """The numbers of groups in the order in which they are acted on, those that are late after the others.

    Args:
        groups: the first layer's first.
        late: names of parameters that are.
        per_layer_loss: from the first to the last, instead of the other way.

    Example:
        >>> step_order([["a"], ["b", "c"], ["d"]], late={"c"})
        [2, 0, 1]
    """
    numbers = range(len(groups)) if per_layer_loss else reversed(range(len(groups)))
    # Sorting keeps the order of those that are equal.
    return sorted(numbers, key=lambda number: not set(late).isdisjoint(groups[number]))


def after_backward_names(
    layers: Sequence[Layer], name_of: Callable[[str], str], *, per_layer_loss: bool, in_chunks: bool
) -> frozenset[str]:
    """Parameters whose gradients come from more than one backward of a micro-batch.

    Args:
        layers: of a partition.
        name_of: gives the one name of several that a tensor may have.
        per_layer_loss: each layer goes back from a loss of its own: what several layers share is late.
        in_chunks: the last layer goes back chunk by chunk.
    """
    own = [{name_of(alias) for alias in layer.parameters()} for layer in layers]
    late = set(own[-1]) if in_chunks else set()
    if per_layer_loss:
        seen: set[str] = set()
        for names in own:
            late |= seen & names
            seen |= names
    return frozenset(late)
