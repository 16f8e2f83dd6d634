"""Quantized optimizer state for tests: values over many magnitudes, parameters with gradients and state."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowmem_pnn.optim.low_precision import PIECE_SIZE, Codec, pieces
from lowmem_pnn.optim.optimizers import OptimizerSpec


def numbers(size: int, seed: int, spread: float) -> Tensor:
    """Both signs; magnitudes over so many powers of e."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * torch.exp(spread * torch.randn(size, generator=generator))


def quantized(codec: Codec, values: Tensor, seed: int = 0) -> dict[str, Tensor]:
    state = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in codec.layout(tuple(values.shape)).items()}
    generator = torch.Generator().manual_seed(seed)
    for piece in pieces(values.numel()):
        codec.quantize(state, piece, values.view(-1)[piece].clone(), generator)
    return state


def dequantized(codec: Codec, state: Mapping[str, Tensor], size: int) -> Tensor:
    return torch.cat([codec.dequantize(state, piece) for piece in pieces(size)])


def parameters(*shapes: tuple[int, ...], seed: int = 4) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {f"p{number}": nn.Parameter(torch.randn(shape, generator=generator)) for number, shape in enumerate(shapes)}


def zeros(spec: OptimizerSpec, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {state: torch.zeros(shape, dtype=dtype) for state, (dtype, shape) in spec.layout(parameter).items()}
        for name, parameter in parameters.items()
    }


def give_gradients(parameters: Mapping[str, nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


PARAMETER_SHAPES = [(64, 65), (17,), (), (300, 257), (PIECE_SIZE // 64 + 1, 64), (8, 8, 8, 8)]
