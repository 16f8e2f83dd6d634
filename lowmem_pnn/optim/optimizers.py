"""Optimizers: PyTorch's own, with their state by name, so that it can be kept in a file between residencies."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from lowmem_pnn.optim.low_precision import CODECS, Bfloat16, Codec, is_quantized, piece_size, pieces
from lowmem_pnn.seeds import seed_of

StateKind = Literal["fp32", "bf16", "int8"]
COUNT = "step"
"""Name of the state tensor that counts a parameter's steps, and belongs to the parameter as a whole."""

_CPU = torch.device("cpu")
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer and its settings, without parameters.

    Args:
        name: `sgd`, `adam` or `adamw`.
        lr: learning rate.
        momentum: momentum of sgd.
        weight_decay: weight decay, added to the gradient (sgd, adam) or decoupled (adamw).
        fused: whether to use PyTorch's fused kernels.
        state: format of the state of adam and adamw; `fp32` is the parameter's own type.
        seed: seed of the run; stochastic rounding follows from it.
        rates: learning rates of single parameters, by name, where they have their own.
        betas: decay of the moments of adam and adamw.
        eps: number added to the root of the second moment of adam and adamw.
        no_decay: names of the parameters that weight decay leaves alone.
        weights: `bf16` where parameters in bfloat16 are stepped in float32, and rounded at random.
    """

    name: Literal["sgd", "adam", "adamw"]
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    fused: bool = True
    state: StateKind = "fp32"
    seed: int = 0
    rates: tuple[tuple[str, float], ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    no_decay: frozenset[str] = frozenset()
    weights: Literal["fp32", "bf16"] = "fp32"

    def __str__(self) -> str:
        """Name the settings that determine the size of the state."""
        if self.name == "sgd":
            return "sgd with momentum" if self.momentum else "sgd"
        kept = [f"{what} in {kind}" for what, kind in (("weights", self.weights), ("state", self.state)) if kind != "fp32"]
        return f"{self.name} with {' and '.join(kept)}" if kept else self.name

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the state tensors of a parameter's shape."""
        if self.name == "sgd":
            return ("momentum_buffer",) if self.momentum else ()
        return ("exp_avg", "exp_avg_sq")

    @property
    def step_temporaries(self) -> float:
        """The most that a step allocates, as a multiple of the largest parameter's bytes, where state is not quantized.

        The unfused loops allocate the decayed gradient (sgd, adam), and the square root and the denominator (adam, adamw), of one
        parameter at a time.
        """
        if self.fused:
            return 0.0
        decayed = float(self.weight_decay > 0 and self.name != "adamw")
        return decayed if self.name == "sgd" else 2.0 + decayed

    def rounds(self, parameter: Tensor) -> bool:
        """Decide whether a parameter is stepped in float32 and rounded at random; only its type is read."""
        return self.weights == "bf16" and parameter.dtype == torch.bfloat16

    def codecs(self, parameter: Tensor) -> tuple[Codec, ...]:
        """Return the codecs of a parameter's state, one for each of `state_names`; none where the state is not quantized.

        Args:
            parameter: parameter of any shape; only its type and shape are read.
        """
        if self.state == "fp32" or not is_quantized(parameter, also_bfloat16=self.weights == "bf16"):
            return ()
        assert self.name != "sgd", "options refuse it"
        return tuple(CODECS[self.state](name, signed=name != "exp_avg_sq") for name in self.state_names)

    def layout(self, parameter: Tensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return name, type and shape of the state tensors of one parameter, all of which start as zeros.

        Args:
            parameter: parameter of any shape; only its type and shape are read.
        """
        shape = tuple(parameter.shape)
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for codec in self.codecs(parameter):
            layout |= codec.layout(shape)
        if not layout:
            layout = dict.fromkeys(self.state_names, (torch.float32 if self.rounds(parameter) else parameter.dtype, shape))
        if self.name != "sgd":
            layout[COUNT] = (torch.float32, ())
        return layout

    def state_sizes(self, parameter: Tensor, num_elements: int) -> dict[str, int]:
        """Return the number of elements that each state tensor has for the first elements of a parameter; without its count of steps.

        Args:
            parameter: parameter of any shape; only its type and shape are read.
            num_elements: number of elements, a multiple of the codecs' blocks, or all.
        """
        codecs = self.codecs(parameter)
        if not codecs:
            return dict.fromkeys(self.state_names, num_elements)
        layouts = [codec.layout((num_elements,)) for codec in codecs]
        return {name: math.prod(shape) for layout in layouts for name, (_, shape) in layout.items()}

    def state_bytes(self, parameter: Tensor) -> int:
        """Return the bytes of the state of one parameter, without its count of steps.

        Args:
            parameter: parameter of any shape; only its type and shape are read.
        """
        return sum(dtype.itemsize * math.prod(shape) for name, (dtype, shape) in self.layout(parameter).items() if name != COUNT)

    def step_bytes(self, parameter: Tensor, most_elements: int | None = None, device: torch.device = _CPU) -> int:
        """Return the most bytes that a step of one parameter allocates.

        Args:
            parameter: parameter of any shape; only its type and shape are read.
            most_elements: most elements that are stepped at one time; None for all.
            device: device on which the parameter will be.
        """
        at_once = min(piece_size(device), parameter.numel(), most_elements or parameter.numel())
        codecs = self.codecs(parameter)
        if self.rounds(parameter):
            temporaries = max(
                self.step_temporaries * _FLOAT_BYTES, Bfloat16.temporary_bytes, *(one.temporary_bytes for one in codecs)
            )
            # Weights and gradients in float32, and what is dequantized.
            return math.ceil(at_once * ((2 + len(codecs)) * _FLOAT_BYTES + temporaries))
        if not codecs:
            size = min(parameter.numel(), most_elements or parameter.numel())
            return math.ceil(self.step_temporaries * size * parameter.element_size())
        temporaries = max(self.step_temporaries * _FLOAT_BYTES, *(codec.temporary_bytes for codec in codecs))
        return math.ceil(at_once * (len(codecs) * _FLOAT_BYTES + temporaries))

    def build(
        self,
        parameters: Mapping[str, nn.Parameter],
        state: Mapping[str, Mapping[str, Tensor]],
        sliced: "SlicedParameter | None" = None,
    ) -> torch.optim.Optimizer:
        """Make the optimizer over parameters that are in memory, with state that is in memory.

        Args:
            parameters: trainable parameters by name, each tensor once.
            state: for each name, the tensors of `layout`, which the optimizer will update in place.
            sliced: the parameter of which the only one of `parameters` is a slice; None where they are whole.

        Returns:
            An optimizer of torch.optim, or `QuantizedStateAdam`; parameters with a rate of their own are in groups that say it (`rate`).
        """
        values = list(parameters.values())
        optimizer: torch.optim.Optimizer
        if self.name == "sgd":
            # fused SGD keeps its momentum buffer from the first step on; zeros give the same first step as none.
            optimizer = torch.optim.SGD(
                values, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, foreach=False, fused=self.fused
            )
        elif self.state != "fp32" or self.weights != "fp32":
            optimizer = QuantizedStateAdam(self, parameters, sliced)
        else:
            kind = torch.optim.AdamW if self.name == "adamw" else torch.optim.Adam
            # foreach would allocate temporaries of all parameters at once.
            optimizer = kind(
                values,
                lr=self.lr,
                betas=self.betas,
                eps=self.eps,
                weight_decay=self.weight_decay,
                foreach=False if not self.fused else None,
                fused=self.fused,
            )
        for name, parameter in parameters.items():
            optimizer.state[parameter] = dict(state[name])
        rates = dict(self.rates)
        kinds = {name: (rates.get(name), name in self.no_decay) for name in parameters}
        if set(kinds.values()) != {(None, False)}:
            [group] = optimizer.param_groups
            optimizer.param_groups[:] = [
                {
                    **group,
                    "params": [one for name, one in parameters.items() if kinds[name] == kind],
                    "rate": kind[0],
                    "weight_decay": 0.0 if kind[1] else self.weight_decay,
                }
                for kind in sorted(set(kinds.values()), key=str)
            ]
        return optimizer


@dataclass
class SlicedParameter:
    """A parameter that is stepped slice by slice, in order.

    Args:
        whole: the parameter; only its type and shape are read.
        generator: random generator of the step's stochastic rounding, which goes on from slice to slice; made by the first slice.
    """

    whole: Tensor
    generator: torch.Generator | None = None


class QuantizedStateAdam(torch.optim.Optimizer):
    """Adam or AdamW with quantized moments, or weights in bfloat16: PyTorch's own step in float32, on a piece of a parameter at a time.

    Stochastic rounding starts, for every parameter and step, from `seed_of(seed, "rounding", name, step)`, where `step` counts from 1.

    Args:
        spec: settings of the optimizer.
        parameters: parameters by name; the caller sets `state`.
        sliced: the parameter of which the only one of `parameters` is a slice; None where they are whole.
    """

    def __init__(
        self, spec: OptimizerSpec, parameters: Mapping[str, nn.Parameter], sliced: SlicedParameter | None = None
    ) -> None:
        super().__init__(list(parameters.values()), {"lr": spec.lr, "weight_decay": spec.weight_decay})
        self._spec = spec
        self._sliced = sliced
        self._names = {parameter: name for name, parameter in parameters.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        assert closure is None, "gradients are there before a step"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(parameter, group["lr"], group["weight_decay"])

    def _step_parameter(self, parameter: nn.Parameter, lr: float, decay: float) -> None:
        state = self.state[parameter]
        gradient = parameter.grad
        assert gradient is not None
        sliced = self._sliced or SlicedParameter(parameter)
        codecs = self._spec.codecs(sliced.whole)  # a slice is quantized as the parameter is, however small it is
        if not codecs and not self._spec.rounds(sliced.whole):
            self._compute(parameter, gradient, state["exp_avg"], state["exp_avg_sq"], state[COUNT], lr, decay)
            return
        if sliced.generator is None:
            sliced.generator = torch.Generator(parameter.device)
            sliced.generator.manual_seed(seed_of(self._spec.seed, "rounding", self._names[parameter], int(state[COUNT]) + 1))
        gradients = gradient.reshape(-1)
        for piece in pieces(parameter.numel(), piece_size(parameter.device)):
            self._step_piece(parameter, gradients, piece, lr, decay, codecs, sliced.generator)
        state[COUNT] += 1

    def _step_piece(
        self,
        parameter: nn.Parameter,
        gradients: Tensor,
        piece: slice,
        lr: float,
        decay: float,
        codecs: tuple[Codec, ...],
        generator: torch.Generator,
    ) -> None:
        """Step one piece; a function of its own, so that no tensor of a piece is held when the next one begins."""
        state = self.state[parameter]
        moments = [codec.dequantize(state, piece) for codec in codecs]
        mean, square = moments or [state[name].view(-1)[piece] for name in self._spec.state_names]
        count = state[COUNT].clone()  # the step increments it, and all pieces have the same count
        weights = parameter.view(-1)[piece]
        rounds = self._spec.rounds(weights)
        values = weights.float() if rounds else weights
        self._compute(values, gradients[piece].to(values.dtype), mean, square, count, lr, decay)
        for codec, moment in zip(codecs, moments, strict=True):
            codec.quantize(state, piece, moment, generator)
        if rounds:
            Bfloat16("weight", signed=True).quantize({"weight": parameter.detach()}, piece, values, generator)

    def _compute(
        self, weights: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, count: Tensor, lr: float, decay: float
    ) -> None:
        """Do PyTorch's step."""
        beta1, beta2 = self._spec.betas
        compute = adamw if self._spec.name == "adamw" else adam
        compute(
            [weights], [gradient], [exp_avg], [exp_avg_sq], [], [count],
            foreach=False, fused=self._spec.fused, amsgrad=False, beta1=beta1, beta2=beta2, eps=self._spec.eps,
            maximize=False, lr=lr, weight_decay=decay,
        )  # fmt: skip
