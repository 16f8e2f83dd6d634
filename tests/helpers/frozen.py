"""Frozen parameters in plain PyTorch, and BatchNorms that stay in eval mode."""

import functools
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn


def freeze_plainly(model: nn.Module, pattern: str, norms: bool) -> nn.Module:
    """What one writes: parameters frozen by name, and with `norms` the BatchNorms that are frozen kept in eval mode."""
    for name, parameter in model.named_parameters():
        if fnmatchcase(name, pattern):
            parameter.requires_grad_(False)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and norms and all(not one.requires_grad for one in own):
            module.eval()
            module.train = functools.partial(_stay, module)  # type: ignore[method-assign]
    return model


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def frozen(build: Callable[[], nn.Module], pattern: str, norms: bool = True) -> Callable[[], nn.Module]:
    return lambda: freeze_plainly(build(), pattern, norms)


class FrozenByItsCode(nn.Sequential):
    """A small network whose own code freezes its first half, and leaves the mode of its BatchNorm as it is."""

    def __init__(self, dropout: float = 0.0, **options: Any) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Dropout(dropout), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip
        for module in list(self)[:5]:
            module.requires_grad_(False)
        for name, buffer in self.named_buffers():
            if "running" in name:
                torch.nn.init.uniform_(buffer, 0.5, 1.5)
