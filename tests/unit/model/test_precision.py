"""Precision: autocast of layers, the loss's scale, maps that lie position by position."""

import math

import pytest
import torch
from torch import nn

from helpers.small_networks import images, small_conv
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.errors import DivergedError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.model.precision import FULL_PRECISION, LossScale, Precision, unscale


def test_a_chain_computes_what_autocast_of_the_model_does() -> None:
    model = small_conv().eval()
    x, _ = images(6)
    chain = capture(model, TensorSpec((3, 8, 8), torch.float32), Precision("bf16"))
    assert [specs[0].dtype for specs in chain.boundaries] == [torch.float32, *[torch.bfloat16] * 4]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chain(x), model(x))


def test_a_scale_moves_as_pytorch_moves_it() -> None:
    ours = LossScale.initial("fp16")
    theirs = torch.amp.GradScaler("cpu")
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    overflows = [True, True, *[False] * 2000, True, *[False] * 2001]
    for overflowed in overflows:
        parameter.grad = torch.full((3,), math.inf if overflowed else 1.0)
        theirs.scale(torch.zeros(()))
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        finite = unscale([torch.full((3,), math.inf if overflowed else 1.0)], ours)
        ours.update(overflowed=not finite)
        assert ours.value == theirs.get_scale()
    assert ours.skipped == 3


def test_gradients_that_overflow_at_any_scale_end_the_run() -> None:
    scale = LossScale.initial("fp16")
    for _ in range(32):
        scale.update(overflowed=True)
    with pytest.raises(DivergedError, match=r"gradients are not finite in float16, whatever .* 33 steps were left out"):
        scale.update(overflowed=True)


def test_without_a_scale_nothing_is_touched() -> None:
    gradient = torch.tensor([math.inf])
    assert unscale([gradient], LossScale.initial("bf16"))
    scale = LossScale.initial("fp32")
    scale.update(overflowed=False)
    assert scale == LossScale()


def test_full_precision_has_no_autocast() -> None:
    with FULL_PRECISION.autocast():
        assert not torch.is_autocast_enabled("cpu")
    with Precision("bf16").autocast():
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_a_chain_keeps_maps_position_by_position() -> None:
    chain = capture(small_conv().eval(), TensorSpec((3, 8, 8), torch.float32), Precision(channels_last=True))
    x, _ = images(6)
    with torch.no_grad():
        (maps,) = chain.layers[0](x)
    assert maps.is_contiguous(memory_format=torch.channels_last)
