"""Dispatch mode: the base of the modes that see every operation below autograd."""

from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):
    """Mode whose `__torch_dispatch__` is called for each operation inside the context, without torch's compiler being imported for it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch's default wraps `__torch_dispatch__` in a guard that imports its compiler: 80 MB of private memory, and seconds.
        return False
