"""Layers that are compiled give what they give uncompiled, in the memory that is foreseen."""

import pytest
import torch
from torch import Tensor, nn

from helpers.compiled import assert_allocates_what_was_foreseen, compiled, three_layers
from lowmem_pnn.model.chain import Chain, TensorSpec


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, Chain]:
    """A network, and its chain with compiled layers."""
    torch.manual_seed(0)
    model = three_layers()
    return model, compiled(model, TensorSpec((3, 8, 8), torch.float32))[0]


def test_code_gives_what_layers_give_draws_included_and_changes_buffers_in_place(network: tuple[nn.Module, Chain]) -> None:
    model, chain = network
    codes = [layer.compiled for layer in chain.layers]
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    x = torch.randn(6, 3, 8, 8)

    def run(with_compiled_layers: bool) -> tuple[dict[str, Tensor], Tensor]:
        model.load_state_dict(values)
        model.zero_grad()
        for layer, code in zip(chain.layers, codes, strict=True):
            layer.compiled = code if with_compiled_layers else None
        torch.manual_seed(1)
        torch.autograd.backward(chain.train()(x).square().sum())
        with torch.no_grad():
            evaluated = chain.eval()(x)
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
        return {**gradients, **{name: buffer.clone() for name, buffer in model.named_buffers()}}, evaluated

    (expected, as_it_is), (found, evaluated) = run(False), run(True)
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    assert buffers["1.num_batches_tracked"] == 1
    torch.testing.assert_close(evaluated, as_it_is)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)


def test_layers_run_as_they_are_where_there_is_no_code(network: tuple[nn.Module, Chain]) -> None:
    layer = network[1].train().layers[2]
    assert layer.compiled is not None
    tensors = {**layer.parameters(), **layer.buffers()}
    one, many, some = (torch.randn(size, 16, requires_grad=True) for size in (1, 13, 5))
    assert layer.compiled(True, tensors, (one,)) is None
    assert layer.compiled(True, tensors, (many,)) is None
    assert layer.compiled(False, tensors, (some,)) is None  # eval mode, with gradients
    assert layer.compiled(True, tensors, (some,)) is not None
    rows = torch.randn(5, 2, 16)
    assert layer.compiled(True, tensors, (rows,)) is None
    for x in (one, many, some, rows):
        torch.testing.assert_close(layer(x)[0], layer.module(x)[0])


def test_code_allocates_no_more_than_was_foreseen(network: tuple[nn.Module, Chain]) -> None:
    assert_allocates_what_was_foreseen(network[1])
