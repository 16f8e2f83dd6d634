"""Optimizers: PyTorch's own, with their state laid out by name, so that it can live in a file between residencies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer and its settings, apart from the parameters that it will step.

    Args:
        name: `sgd`, `adam` or `adamw`.
        lr: learning rate.
        momentum: of sgd.
        weight_decay: added to the gradient (sgd, adam) or decoupled (adamw).
        fused: use PyTorch's fused kernels.
    """

    name: Literal["sgd", "adam", "adamw"]
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    fused: bool = True

    @property
    def state_names(self) -> tuple[str, ...]:
        """State tensors of a parameter's shape."""
        if self.name == "sgd":
            return ("momentum_buffer",) if self.momentum else ()
        return ("exp_avg", "exp_avg_sq")

    @property
    def step_temporaries(self) -> float:
        """What a step allocates at most, as a multiple of the largest parameter's bytes.

        The unfused loops make the decayed gradient (sgd, adam), and the square root and the denominator (adam, adamw), of one
        parameter at a time.
        """
        if self.fused:
            return 0.0
        decayed = float(self.weight_decay > 0 and self.name != "adamw")
        return decayed if self.name == "sgd" else 2.0 + decayed

    def layout(self, parameter: Tensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, type and shape of the state of one parameter. All of it starts as zeros.

        Args:
            parameter: of any shape; only its type and shape are read.
        """
        shape = tuple(parameter.shape)
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = dict.fromkeys(self.state_names, (parameter.dtype, shape))
        if self.name != "sgd":
            layout["step"] = (torch.float32, ())
        return layout

    def build(self, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Mapping[str, Tensor]]) -> torch.optim.Optimizer:
        """Make the optimizer over parameters that are in memory, with state that is in memory.

        Args:
            parameters: by name; only trainable ones, each tensor once.
            state: for each name, the tensors of `layout`, which the optimizer will update in place.

        Returns:
            One of torch.optim's.
        """
        values = list(parameters.values())
        optimizer: torch.optim.Optimizer
        if self.name == "sgd":
            # fused SGD keeps its momentum buffer from the first step on; zeros give the same first step as none.
            optimizer = torch.optim.SGD(
                values, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, foreach=False, fused=self.fused
            )
        else:
            kind = torch.optim.AdamW if self.name == "adamw" else torch.optim.Adam
            # foreach would hold temporaries of every parameter at once.
            optimizer = kind(
                values, lr=self.lr, weight_decay=self.weight_decay, foreach=False if not self.fused else None, fused=self.fused
            )
        for name, parameter in parameters.items():
            optimizer.state[parameter] = dict(state[name])
        return optimizer
