"""Functions of integers: what a model calls shows whether its samples are numbers, where fake tensors do not tell."""

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions of integers that fake tensors do not refuse floats for.
_INTEGER_FUNCTIONS = frozenset(
    {"and", "or", "xor", "rand", "ror", "rxor", "iand", "ior", "ixor", "gcd", "lcm", "index_select"}
    | {f"{name}{end}" for name in ("bitwise_and", "bitwise_or", "bitwise_xor", "gcd", "lcm") for end in ("", "_")}
)


class RefusesFloatsForIntegers(TorchFunctionMode):
    """Raises where a model gives floats to a function of integers that takes them on fake tensors, and on real ones does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        values = [*args, *kwargs.values()]
        # The input of index_select may be floats; its index, which comes last, may not.
        operands = values[-1:] if name == "index_select" else values
        if name in _INTEGER_FUNCTIONS and any(isinstance(value, Tensor) and value.is_floating_point() for value in operands):
            raise TypeError(f"{name} takes integers, and was given float32")
        return func(*args, **kwargs)
