"""Dispatch mode: the base of the modes that see every operation below autograd."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

_DEVICE = torch.ops.prim.device.default


def asked_device(func: Any, args: Any) -> torch.device | None:
    """Return the device of a fake tensor where an operation is the question for it; else None.

    More than half of what a forward on fake tensors dispatches are such questions: a mode that answers first is twice as fast.
    """
    return args[0].fake_device if func is _DEVICE and isinstance(args[0], FakeTensor) else None


class DispatchMode(TorchDispatchMode):
    """Mode whose `__torch_dispatch__` is called for each operation inside the context, without torch's compiler being imported for it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch's default wraps `__torch_dispatch__` in a guard that imports its compiler: 80 MB of private memory, and seconds.
        return False
