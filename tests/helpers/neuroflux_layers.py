"""Layers with auxiliary heads, as neuroflux trains them."""

from typing import Any

import torch

from helpers.plainloops import built
from helpers.small_networks import conv_layers
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.methods import make_method
from lowmem_pnn.model.chain import Chain, TensorSpec

OPTIONS: dict[str, Any] = {"method": "neuroflux", "epochs": 2, "batch_size": 16, "lr": 0.01, "device": "cpu", "val_fraction": 0.2}


def layers_with_heads(config: FitConfig) -> Chain:
    """`conv_layers` with real weights and heads."""
    chain = capture(built(conv_layers), TensorSpec((3, 8, 8), torch.float32))
    method, layers = make_method(config), []
    for number, layer in enumerate(chain.layers):
        torch.manual_seed(number)
        head = method.head(chain, number, 4, tokens=False)
        layers.append(layer if head is None else layer.with_head(head, number))
    return Chain(tuple(layers), chain.boundaries, chain.ties, chain.tied_ranges, chain.unused, chain.persistent)
