"""Chains with compiled layers for tests."""

import torch
from torch import nn

from lowmem_pnn.model.chain import Chain, TensorSpec, capture
from lowmem_pnn.model.compiler import Compiler, CompileVariant

CPU = torch.device("cpu")


def alike() -> nn.Module:
    """Three shapes of layers: a first, three alike, a last."""
    square = (module for _ in range(3) for module in (nn.Linear(16, 16), nn.GELU()))
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), *square, nn.Linear(16, 4))


def compiled(model: nn.Module, spec: TensorSpec) -> tuple[Chain, Compiler]:
    """The model's chain with code for 2 to 8 samples."""
    chain = capture(model, spec)
    compiler = Compiler(range(2, 9), CPU)
    for number, layer in enumerate(chain.layers):
        compiler.compile(
            layer, chain.boundaries[number], [CompileVariant(trains=True, learns_input=number > 0), CompileVariant(trains=False)]
        )
    return chain, compiler
