"""Layers: a head is added to a copy; and recurrent ones go back in eval mode too."""

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.capture.capture import capture
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.model.layer import Layer


def test_a_layer_stays_without_a_head_where_another_one_is_made_with_it() -> None:
    chain = capture(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), TensorSpec((4,), torch.float32))
    layer, objects = chain.layers[0], chain.num_objects
    headed = layer.with_head(nn.Linear(3, 5), 0)
    assert chain.num_objects == objects
    assert layer.head is None
    assert not any("auxiliary" in name for name, _ in layer.module.named_modules())
    assert headed.parameters().keys() - layer.parameters().keys() == {"auxiliary_heads.0.weight", "auxiliary_heads.0.bias"}
    x = torch.rand(6, 4)
    headed.train()
    outputs = headed(x)
    assert headed.scores(outputs)[0].shape == (6, 5)
    # One set of weights and buffers.
    assert all(headed.parameters()[name] is parameter for name, parameter in layer.parameters().items())
    assert all(headed.buffers()[name] is buffer for name, buffer in layer.buffers().items())


class Recurrent(nn.LSTM):
    """Notes whether cuDNN could run it."""

    def forward(self, x: Tensor) -> Tensor:
        self.with_cudnn = torch.backends.cudnn.enabled
        outputs: Tensor = super().forward(x)[0]
        return outputs


@pytest.mark.parametrize(("mode", "gradients", "expected"), [(False, True, False), (True, True, True), (False, False, True)])
def test_recurrent_modules_run_without_cudnn_where_gradients_go_back_in_eval_mode(
    mode: bool, gradients: bool, expected: bool
) -> None:
    """It raises there: "cudnn RNN backward can only be called in training mode"."""
    module = Recurrent(4, 3)
    layer = Layer("lstm", module, [name for name, _ in module.named_parameters()])
    layer.train(mode)
    with torch.set_grad_enabled(gradients):
        layer.run_on(dict(layer.parameters()), torch.rand(2, 5, 4))
    assert module.with_cudnn is expected
    assert torch.backends.cudnn.enabled
