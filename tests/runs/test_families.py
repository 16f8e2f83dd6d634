"""Families of torchvision's classifiers as chains: in every mode, with any number of samples, cut anywhere, the model's own outputs."""

import pytest
import torch

from helpers.networks import FAMILIES, assert_cut_anywhere, assert_equal, build, images, run
from lowmem_pnn.capture.capture import capture


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# Those that are captured in train mode, and compared in both modes.
TRAINED = {"convnext", "densenet", "efficientnet", "maxvit", "mobilenet_v3", "resnet", "swin_v2", "vit"}


@pytest.mark.parametrize("family", FAMILIES)
def test_torchvision_family_is_same_as_model(family: str) -> None:
    model, side = build(family)
    chain = capture(model.train(family in TRAINED), images(side))
    assert len(chain.layers) >= 5
    if family in TRAINED:
        x = torch.randn(3, 3, side, side)
        assert_equal(chain, model, x)
        assert not torch.equal(run(chain, x, 1), run(chain.eval(), x, 1))
        counts = {int(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")}
        assert counts <= {3}  # once for each of the three runs in train mode
        assert_cut_anywhere(chain.train(), torch.randn(5, 3, side, side))
    chain.eval()
    assert_equal(chain, model.eval(), torch.randn(2, 3, side, side))
    for num_samples in (1, 5):
        assert_cut_anywhere(chain, torch.randn(num_samples, 3, side, side))
