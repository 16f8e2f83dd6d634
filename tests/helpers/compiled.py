"""Chains with compiled layers for tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as watch

from lowmem_pnn.capture.capture import capture
from lowmem_pnn.compilation.compiled_layer import CompiledFunction, CompileVariant
from lowmem_pnn.compilation.compiler import Compiler
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.profiling.fake_run import _Sink
from lowmem_pnn.profiling.memory_profiler import profile

CPU = torch.device("cpu")


def alike() -> nn.Module:
    """Three shapes of layers: a first, three alike, a last."""
    square = (module for _ in range(3) for module in (nn.Linear(16, 16), nn.GELU()))
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), *square, nn.Linear(16, 4))


def convolution() -> list[nn.Module]:
    """The modules of one layer, with norm and dropout: of images of 8 x 8 it makes 96 values."""
    return [nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.2), nn.Flatten()]


def two_layers() -> nn.Module:
    return nn.Sequential(*convolution(), nn.Linear(96, 4))


def tied_words() -> nn.Module:
    """Embedded words, a layer, and a head that has the embedding's weight."""
    model = nn.Sequential(nn.Embedding(13, 16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 13, bias=False))
    model[3].weight = model[0].weight
    return model


def three_layers() -> nn.Module:
    return nn.Sequential(*convolution(), nn.Linear(96, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))


def compiled(model: nn.Module, spec: TensorSpec, trains_only: bool = False) -> tuple[Chain, Compiler]:
    """The model's chain with code for 2 to 12 samples: the code of runs with batches of 12, so that the compiler's cache has it."""
    chain = capture(model, spec)
    compiler = Compiler(range(2, 13), CPU)
    for number, layer in enumerate(chain.layers):
        variants = [CompileVariant(trains=True, learns_input=number > 0), CompileVariant(trains=False)]
        compiler.compile(layer, chain.boundaries[number], variants[: 1 if trains_only else 2])
    return chain, compiler


Shared = dict[Any, dict[Any, list[CompiledFunction]]]


@contextmanager
def sharing_code() -> Iterator[Shared]:
    """Compilers for the same numbers of samples share their functions, which depend on no plan, until what they share is cleared."""
    begin, shared = Compiler.__init__, Shared()

    def begin_sharing(compiler: Compiler, *arguments: Any, **named: Any) -> None:
        begin(compiler, *arguments, **named)
        compiler._functions = shared.setdefault(tuple(compiler.sizes), {})

    with mock.patch.object(Compiler, "__init__", begin_sharing):
        yield shared


def assert_allocates_what_was_foreseen(chain: Chain) -> None:
    """Forward, what it keeps, and backward of every layer stay below its costs."""
    costs = profile(chain, optimizers=[OptimizerSpec("adam")], device=CPU)
    chain.train()
    size = 7
    for number, (layer, cost) in enumerate(zip(chain.layers, costs.layers, strict=True)):
        specs = chain.boundaries[number]
        forward, kept, backward = _allocations(layer, tuple(_samples(size, spec, learns=number > 0) for spec in specs))
        assert kept <= cost.kept.at(size), layer.name
        # Convolutions of few channels have more scratch memory than is foreseen, with code or without: as much as maps of 16.
        scratch = 2 * size * 16 * 64 * 4 if any(tensor.dim() == 4 for tensor in layer.parameters().values()) else 0
        assert forward <= cost.forward_peak.at(size) + scratch, layer.name
        assert backward <= cost.output_bytes.at(size) + cost.backward_peak.at(size) + scratch, layer.name


def _allocations(layer: Layer, inputs: tuple[Tensor, ...]) -> tuple[int, int, int]:
    """The most bytes in a layer's forward, those after it, and the most in its backward above those."""
    results: list[tuple[Tensor, ...]] = []
    forward, kept = _allocated(lambda: results.append(layer(*inputs)))
    end = _Sink.apply(CPU, *results.pop())  # makes gradients that nobody else holds
    begin = torch.ones_like(end)
    backward, _ = _allocated(lambda: end.backward(begin))
    return forward, kept, backward


def _samples(size: int, spec: TensorSpec, *, learns: bool) -> Tensor:
    if not spec.dtype.is_floating_point:
        return torch.zeros(size, *spec.shape, dtype=spec.dtype)
    return torch.randn(size, *spec.shape).requires_grad_(learns)


def _allocated(work: Callable[[], Any]) -> tuple[int, int]:
    """The most bytes that PyTorch's allocator had given out in some work, and those it had at its end, above those at its beginning."""
    with watch(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    live = highest = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest, live
