"""Activation checkpointing in a model's own forward, which is left out: the plan says what is computed again."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint

_HOW = ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")


@contextmanager
def checkpointing_left_out() -> Iterator[list[Any]]:
    """Make `torch.utils.checkpoint` call what it is given and nothing more, however a model came by that function.

    Modules hold `checkpoint` by import, in partial functions and as a decorator, so that what it calls is replaced and not the name.

    Yields:
        A list of the functions that were given to it since.

    Example:
        >>> import torch
        >>> from torch.utils.checkpoint import checkpoint
        >>> with checkpointing_left_out() as called:
        ...     y = checkpoint(torch.exp, torch.zeros(2, requires_grad=True), use_reentrant=False)
        >>> type(y.grad_fn).__name__, called == [torch.exp]
        ('ExpBackward0', True)
    """
    called: list[Any] = []

    def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], **how: Any) -> Any:
        called.append(function)
        return function(*args, **kwargs)

    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(function, args, {key: value for key, value in kwargs.items() if key not in _HOW})

    # Newer versions of torch call `_checkpoint_impl`, from the decorator too. Older ones have a function that was made unknown to
    # torch.compile, and look up what to call on it at each call.
    if hasattr(torch.utils.checkpoint, "_checkpoint_impl"):
        place, name, replacement = torch.utils.checkpoint, "_checkpoint_impl", call
    else:
        place, name, replacement = inspect.unwrap(torch.utils.checkpoint.checkpoint), "__dynamo_disable", checkpoint
    before = getattr(place, name, None)
    setattr(place, name, replacement)
    try:
        yield called
    finally:
        setattr(place, name, before)
