"""The optimizer in backward: in which order groups of parameters are stepped, and which wait until after backward."""

import functools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.simulated import chain_of
from helpers.small_networks import wide_mlp
from lowmem_pnn.engine.optimizer_in_backward import OptimizerInBackward, after_backward_names, step_order
from lowmem_pnn.model.layer import gradients_complete_at_once


def backward(model: nn.Sequential, after_backward: set[str], at_once: bool) -> tuple[list[int], list[int]]:
    """Groups in the order in which they were acted on: during backward, and after it."""
    during: list[int] = []
    parameters = dict(model.named_parameters())
    groups = [[name for name in parameters if name.startswith(f"{number}.")] for number in range(len(model))]

    def act(number: int) -> None:
        assert all(parameters[name].grad is not None for name in groups[number])
        during.append(number)
        for name in groups[number]:
            parameters[name].grad = None

    with OptimizerInBackward(groups, parameters, after_backward, act, at_once=at_once) as stepping:
        model(torch.ones(3, 4)).sum().backward()
    before = list(during)
    assert stepping.stepped == {name for number in before for name in groups[number]}
    stepping.finish()
    assert stepping.stepped == set(parameters)
    # No hook is left: nothing is acted on again.
    model(torch.ones(3, 4)).sum().backward()
    return before, during[len(before) :]


@given(st.sets(st.sampled_from(["0.bias", "1.weight", "3.weight", "3.bias"])), st.booleans())
def test_groups_are_acted_on_from_the_last_to_the_first_and_others_after_backward(names: set[str], at_once: bool) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    waiting = {int(name[0]) for name in names}
    before, after = backward(model, names, at_once)
    expected = [number for number in (3, 2, 1, 0) if number not in waiting]
    assert before == (expected if at_once else [])
    assert (
        before + after
        == expected + sorted(waiting, reverse=True)
        == step_order([[f"{n}.weight", f"{n}.bias"] for n in range(4)], names)
    )


def test_what_steps_after_backward_has_gradients_from_more_than_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
            self.layers[2].weight = self.layers[0].weight

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.layers(x)
            return scores

    chain = chain_of(Tied, 4)
    names = functools.partial(after_backward_names, chain.layers, lambda name: name.replace("2.weight", "0.weight"))
    assert names(per_layer_loss=False, in_chunks=False) == frozenset()
    assert names(per_layer_loss=True, in_chunks=False) == {"layers.0.weight"}
    assert names(per_layer_loss=False, in_chunks=True) == {"layers.0.weight", "layers.2.bias"}
    chain.layers[1].detached = frozenset({"layers.1.bias"})
    assert names(per_layer_loss=False, in_chunks=False) == {"layers.1.bias"}
    assert gradients_complete_at_once(chain.layers, in_chunks=False) == [False, False, False]
    chain.layers[1].detached = frozenset()
    # Plans count on less: the tied weight's gradient waits for the first layer's.
    assert gradients_complete_at_once(chain.layers, in_chunks=False) == [False, True, False]
    assert gradients_complete_at_once(chain_of(wide_mlp, 96).layers, in_chunks=True) == [True] * 5 + [False]
