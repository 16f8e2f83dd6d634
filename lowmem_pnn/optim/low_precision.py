"""Quantized optimizer state: moments in int8 or bfloat16, dequantized only while they are stepped, a piece at a time.

    int8   a code (uint8) for each element, one of 256 levels, and a scale (float32) for each block of 256 elements: 1.016 bytes
    bf16   the upper half of a float32, after stochastic rounding: 2 bytes

The levels of int8 are the dynamic quantization of Dettmers et al. 2022 (arXiv 2110.02861, sections 2.1 and 2.2), by torchao's functions:
dense near zero, and signed for the mean of gradients, unsigned for the mean of their squares. torchao's search for a code takes 90 ns an
element on a CPU's core; here a table, which is filled by that search, gives the same code in a twentieth of the time.

With one exception: a square that is not zero is not quantized to zero. Where gradients of a block differ by more than four orders of
magnitude the mean of a small one is above the lowest signed level while the mean of its squares is below the lowest unsigned level, and
a step, which is their ratio, would be as large as the smallest denominator allows: weights of an input that is seldom active grew from
0.08 to 12.

A mean that moves by a thousandth of a distance each step moves by less than the precision of bfloat16, and would stand still if it were
rounded to the nearest value; stochastic rounding is right in the mean.

On the CPU its random numbers are the same however a parameter is cut into pieces. A GPU's generator gives other ones for other pieces:
where a step slice has fewer elements than `GPU_PIECE_SIZE` (budgets below 512 MiB), `exact` rounds otherwise there than `backprop`.
"""

import functools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lowmem_pnn.errors import ConfigError

BLOCK_SIZE = 256
"""Number of elements that share a scale."""

MIN_QUANTIZED_SIZE = 4096
"""Number of elements below which tensors are not quantized, as with torchao: biases and norms, which are sensitive, and small."""

PIECE_SIZE = 1 << 16
"""Number of elements that are dequantized at one time: few enough for a core's cache, enough for the overhead of calls to be small."""

GPU_PIECE_SIZE = 1 << 21
"""The same on a GPU, which takes as long for a piece of 65,536 elements as its driver for the calls: as many as a step slice has at most."""

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def is_quantized(parameter: Tensor, *, also_bfloat16: bool = False) -> bool:
    """Decide whether the state of a parameter is quantized; only its type and shape are read.

    Args:
        parameter: the parameter.
        also_bfloat16: whether parameters in bfloat16 are stepped in float32, as those in float32 are.
    """
    is_stepped_in_float32 = parameter.dtype == torch.float32 or (also_bfloat16 and parameter.dtype == torch.bfloat16)
    return is_stepped_in_float32 and parameter.numel() >= MIN_QUANTIZED_SIZE


def piece_size(device: torch.device) -> int:
    """Return the number of elements that are dequantized at one time on a device."""
    return GPU_PIECE_SIZE if device.type == "cuda" else PIECE_SIZE


def pieces(num_elements: int, size: int = PIECE_SIZE) -> Iterator[slice]:
    """Divide a flat tensor into pieces of whole blocks; a last block that is not whole is a piece of its own.

    Args:
        num_elements: number of elements.
        size: elements of a piece, a multiple of `BLOCK_SIZE`.

    Example:
        >>> [(piece.start, piece.stop) for piece in pieces(65536 + 300)]
        [(0, 65536), (65536, 65792), (65792, 65836)]
    """
    whole = num_elements - num_elements % BLOCK_SIZE
    for begin in range(0, whole, size):
        yield slice(begin, min(begin + size, whole))
    if whole < num_elements:
        yield slice(whole, num_elements)


@dataclass(frozen=True)
class Codec(ABC):
    """The quantization of one tensor of an optimizer's state.

    Args:
        name: name of the tensor in PyTorch's optimizer.
        signed: whether the tensor has negative values.
    """

    name: str
    signed: bool

    temporary_bytes: ClassVar[int]
    """Bytes that `quantize` allocates at most for each element of a piece, beside its values."""

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Return name, type and shape of the quantized tensors; zeros in all of them stand for zeros."""

    @abstractmethod
    def dequantize(self, state: Mapping[str, Tensor], piece: slice) -> Tensor:
        """Return the values of a piece, flat and in float32.

        Args:
            state: quantized tensors, by the names of `layout`.
            piece: one of `pieces`.
        """

    @abstractmethod
    def quantize(self, state: Mapping[str, Tensor], piece: slice, values: Tensor, generator: torch.Generator) -> None:
        """Replace the values of a piece.

        Args:
            state: quantized tensors as for `dequantize`; they are changed.
            piece: one of `pieces`.
            values: new values, flat, float32; their memory is overwritten.
            generator: random generator of stochastic rounding.
        """


class Bfloat16(Codec):
    """The upper half of a float32, after stochastic rounding."""

    temporary_bytes = 6  # draws, and noise

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return {self.name: (torch.bfloat16, shape)}

    def dequantize(self, state: Mapping[str, Tensor], piece: slice) -> Tensor:
        return state[self.name].view(-1)[piece].float()

    def quantize(self, state: Mapping[str, Tensor], piece: slice, values: Tensor, generator: torch.Generator) -> None:
        size = len(values)
        # The 64 bits of a draw serve four elements.
        draws = torch.empty(math.ceil(size / 4), dtype=torch.int64, device=values.device)
        draws.random_(-(2**63), None, generator=generator)
        noise = draws.view(torch.int16)[:size].to(torch.int32).bitwise_and_(0xFFFF)
        # A float's bits count its magnitude: 16 random bits, added to its lower half, carry with a probability of lower half / 2^16.
        upper = values.view(torch.int32).add_(noise).bitwise_right_shift_(16)
        state[self.name].view(-1)[piece].view(torch.int16).copy_(upper)


class Int8(Codec):
    """A code, the number of a level, for each element, and a scale for each block: its largest magnitude."""

    temporary_bytes = 15  # scaled values, indices into the table, codes, thresholds, results of comparisons; scales

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return {
            f"{self.name}.codes": (torch.uint8, shape),
            f"{self.name}.scale": (torch.float32, (math.ceil(math.prod(shape) / BLOCK_SIZE),)),
        }

    def dequantize(self, state: Mapping[str, Tensor], piece: slice) -> Tensor:
        codes, scale = self._parts(state, piece)
        values = _int8_levels(self.signed, codes.device).values.index_select(0, codes.int())
        values.view(len(scale), -1).mul_(scale.view(-1, 1))
        return values

    def quantize(self, state: Mapping[str, Tensor], piece: slice, values: Tensor, generator: torch.Generator) -> None:
        codes, scale = self._parts(state, piece)
        scaled, largest = _torchao().scale_tensor(values, min(BLOCK_SIZE, len(values)))
        scale.copy_(largest)
        codes.copy_(_int8_levels(self.signed, codes.device).quantize(scaled))

    def _parts(self, state: Mapping[str, Tensor], piece: slice) -> tuple[Tensor, Tensor]:
        blocks = slice(piece.start // BLOCK_SIZE, math.ceil(piece.stop / BLOCK_SIZE))
        return state[f"{self.name}.codes"].view(-1)[piece], state[f"{self.name}.scale"][blocks]


CODECS: dict[Literal["bf16", "int8"], type[Codec]] = {"bf16": Bfloat16, "int8": Int8}


@dataclass(frozen=True)
class QuantizationLevels:
    """The 256 values that codes stand for, and a table that gives the code of a value.

    Args:
        values: values by code, ascending, (256,) float32; from -0.993 to 1, or from 0 to 1.
        lowest: by the upper 16 bits of a float32, the code of the smallest value that begins with them, (65536,) uint8.
        thresholds: by code, the smallest value that has a higher code, (256,) float32.
    """

    values: Tensor
    lowest: Tensor
    thresholds: Tensor

    def quantize(self, scaled: Tensor) -> Tensor:
        """Return the code of the level nearest to each value, as torchao's search does.

        Unsigned levels: the code of the lowest level above zero for values that are positive and nearest to zero.

        Args:
            scaled: values from -1 to 1, (N,) float32.

        Returns:
            Codes, (N,) uint8.
        """
        index = scaled.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
        codes = self.lowest.index_select(0, index)
        # Values that begin with the same 16 bits have two codes at most.
        thresholds = self.thresholds.index_select(0, index.copy_(codes))
        return codes.add_((scaled >= thresholds).view(torch.uint8))


@functools.lru_cache
def _int8_levels(signed: bool, device: torch.device) -> QuantizationLevels:
    torchao = _torchao()
    values = torch.tensor(torchao.create_dynamic_map(signed=signed), dtype=torch.float32)

    def search(scaled: Tensor) -> Tensor:
        codes: Tensor = torchao.quantize_8bit_with_qmap(scaled, values)
        return codes if signed else codes.maximum((scaled > 0).to(torch.uint8))

    bits = torch.arange(1 << 16, dtype=torch.int32).bitwise_left_shift_(16)
    first, last = search(bits.view(torch.float32)), search((bits | 0xFFFF).view(torch.float32))
    lowest, highest = torch.minimum(first, last), torch.maximum(first, last)  # negative values descend as their bits count up
    scaled = bits.view(torch.float32).abs() <= 1
    assert bool((highest - lowest <= 1)[scaled].all()), "two levels lie between values that begin with the same 16 bits"
    # Between two neighbouring levels, halved until the bounds are neighbouring floats.
    below, above, codes = values[:-1], values[1:], torch.arange(255, dtype=torch.uint8)
    while bool((torch.nextafter(below, above) < above).any()):
        middle = torch.where(torch.nextafter(below, above) < above, (below + above) / 2, above)
        higher = search(middle) > codes
        below, above = torch.where(higher, below, middle), torch.where(higher, middle, above)
    thresholds = torch.cat([above, torch.tensor([math.inf])])
    return QuantizationLevels(values.to(device), lowest.to(device), thresholds.to(device))


def load_int8_levels() -> None:
    """Import torchao and make the tables of `int8`: some megabytes, which belong to the process, not to a training.

    Raises:
        ConfigError: torchao cannot be imported.
    """
    for signed in (True, False):
        _int8_levels(signed, torch.device("cpu"))


@functools.lru_cache
def _torchao() -> Any:
    """Import torchao's module of functions for quantized optimizer state.

    Raises:
        ConfigError: torchao is not installed, or does not run with this version of PyTorch.
    """
    # One of its modules logs a warning meant for its authors when it is imported.
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torchao.optim import quant_utils
    except ImportError as error:
        raise ConfigError(
            f"--optimizer-state int8 needs torchao, which cannot be imported ({error}); pip install 'lowmem-pnn[torchao]', or give bf16"
        ) from None
    finally:
        logger.setLevel(level)
    return quant_utils
