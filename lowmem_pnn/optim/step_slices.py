"""Step slices: the parameters of a layer cut up so that a step needs a few megabytes of optimizer state at a time.

    weights    [ slice 0 | slice 1 | slice 2 ]      resident, or read slice by slice too
    gradient   [ slice 0 | slice 1 | slice 2 ]
    state        slice 0 --> step --> written, then slice 1, ...

All our optimizers step each element by itself, so that a step by slices has the bits of a step as a whole, as long as vectorized kernels
divide a slice as they divide the whole: every slice but the last is a multiple of `SLICE_UNIT` elements.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from lowmem_pnn.optim.low_precision import PIECE_SIZE
from lowmem_pnn.optim.optimizers import OptimizerSpec

SLICE_UNIT = PIECE_SIZE
"""Number of elements that slices are multiples of: the pieces in which quantized state is dequantized."""


@dataclass(frozen=True)
class StepSlice:
    """Some elements of a parameter, in the order of its memory.

    Args:
        name: name of the parameter.
        begin: first element.
        end: element after the last.
        size: number of elements of the parameter.
    """

    name: str
    begin: int
    end: int
    size: int

    @property
    def is_whole(self) -> bool:
        """Whether these are all elements of the parameter."""
        return self.end - self.begin == self.size

    @property
    def is_last(self) -> bool:
        """Whether no elements come after these."""
        return self.end == self.size

    @property
    def elements(self) -> slice:
        """The elements in the flat parameter."""
        return slice(self.begin, self.end)


def step_slices(parameters: Mapping[str, Tensor], most_elements: int) -> Iterator[list[StepSlice]]:
    """Divide parameters into what is stepped at one time: one slice of a large parameter, or several small parameters.

    Args:
        parameters: parameters by name; only their shapes are read.
        most_elements: most elements at one time; rounded up to a multiple of `SLICE_UNIT`.

    Example:
        >>> import torch
        >>> parameters = {"weight": torch.empty(100_000, device="meta"), "bias": torch.empty(10), "scale": torch.empty(5)}
        >>> [[(one.name, one.begin, one.end) for one in step] for step in step_slices(parameters, 65536)]
        [[('weight', 0, 65536)], [('weight', 65536, 100000)], [('bias', 0, 10), ('scale', 0, 5)]]
    """
    most = max(1, math.ceil(most_elements / SLICE_UNIT)) * SLICE_UNIT
    small: list[StepSlice] = []
    total = 0
    for name, parameter in parameters.items():
        size = parameter.numel()
        if small and total + size > most:
            yield small
            small, total = [], 0
        if size <= most:
            small.append(StepSlice(name, 0, size, size))
            total += size
            continue
        for begin in range(0, size, most):
            yield [StepSlice(name, begin, min(begin + most, size), size)]
    if small:
        yield small


def state_elements(spec: OptimizerSpec, parameter: Tensor, part: StepSlice) -> dict[str, slice | None]:
    """Return which elements of a parameter's state belong to a slice; None for a tensor that belongs to the parameter as a whole.

    Args:
        spec: optimizer.
        parameter: the whole parameter; only its type and shape are read.
        part: slice of the parameter.
    """
    before, until = (spec.state_sizes(parameter, end) for end in (part.begin, part.end))
    return {name: slice(before[name], until[name]) if name in until else None for name in spec.layout(parameter)}


def largest_state_bytes(spec: OptimizerSpec, parameters: Mapping[str, Tensor], most_elements: int) -> int:
    """Return the most bytes of state that a step by slices holds at one time.

    Args:
        spec: optimizer.
        parameters: parameters by name; only their types and shapes are read.
        most_elements: most elements at one time, as for `step_slices`.
    """

    def nbytes(part: StepSlice) -> int:
        parameter = parameters[part.name]
        elements = state_elements(spec, parameter, part)
        return sum(
            dtype.itemsize * (elements[name].stop - elements[name].start)  # type: ignore[union-attr]
            for name, (dtype, _) in spec.layout(parameter).items()
            if elements[name] is not None
        )

    return max((sum(map(nbytes, parts)) for parts in step_slices(parameters, most_elements)), default=0)
