"""Auxiliary heads: how many filters they have, and what they take."""

from typing import Any

import pytest
import torch
from torch import nn

from lowmem_pnn.methods.heads import make_head, num_filters
from lowmem_pnn.model.chain import TensorSpec


def test_the_number_of_filters_follows_the_rule() -> None:
    assert [num_filters("adaptive", channels, side) for channels, side in ((64, 32), (128, 16), (256, 8), (512, 4))] == [
        32,
        64,
        128,
        256,
    ]
    assert num_filters("adaptive", 8, 32) == 16
    assert num_filters("adaptive", 2048, 2) == 256
    for kind in ("adaptive", "classic", "auglocal"):
        head = make_head(kind, TensorSpec((32, 16, 16), torch.float32), [TensorSpec((48, 8, 8), torch.float32)], 7, tokens=False)
        convolutions = [module for module in head.modules() if isinstance(module, nn.Conv2d)]
        assert [module.out_channels for module in convolutions] == {"adaptive": [16], "classic": [256], "auglocal": [48]}[kind]
        assert head.eval()(torch.zeros(2, 32, 16, 16)).shape == (2, 7)


@pytest.mark.parametrize("kind", ["adaptive", "classic", "auglocal", "linear"])
def test_vectors_tokens_and_maps_have_heads_of_their_kind(kind: Any) -> None:
    for shape, tokens, expected in (
        ((30,), False, (2, 5)),
        ((9, 30), False, (2, 5)),
        ((9, 30), True, (2, 9, 5)),
        ((6, 4, 4), False, (2, 5)),
    ):
        head = make_head(kind, TensorSpec(shape, torch.float32), [], 5, tokens=tokens)
        assert head(torch.randn(2, *shape)).shape == expected
