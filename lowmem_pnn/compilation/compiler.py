"""Compilation of layers by PyTorch's compiler, once for all layers with the same operations and shapes.

    layer --traced on fake tensors--> graph --operations and shapes known?--> the function that is there
                                            --new?--> TorchInductor, forward and backward --> function

It is `torch.compile` without its first half: Dynamo finds graphs in Python code and guards the objects that it saw there, but a layer
is a graph already, and every residency gives it other objects. So a traced graph takes all of a layer's tensors as arguments, in order,
and whichever layer has the same graph calls the same function with its own tensors. The number of samples stays a symbol: functions do
not depend on a plan, and the rest of a batch needs none of its own. Where the compiler decides something by the number of samples, the
function holds for a range of numbers, and the others get functions of their own. One sample alone is such a case in most layers: the
layer then runs as a module.

All functions are compiled before training, on fake tensors: nothing is allocated or run, and the compiler's memory is no training
memory.

This file and `traced_layer.py` use private modules of torch, which change between its minor versions: `check_compiler` refuses versions that
were not tested.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lowmem_pnn.compilation.compiled_layer import CompiledFunction, CompiledLayer, CompileVariant
from lowmem_pnn.compilation.traced_layer import TracedLayer, without_gradient_hooks
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.call_form import TensorSpec
from lowmem_pnn.model.layer import Layer

# Minor versions of torch with which the tests of this file have passed.
_TESTED_TORCH = ("2.14",)

# Functions, each for a range of numbers of samples, that a graph may have; at any other number layers run as modules.
_MAX_RANGES = 3


@dataclass
class Compiler:
    """A compiler of layers, which keeps its functions for layers with the same graph.

    Args:
        sizes: numbers of samples that occur.
        device: device of the layers.
        seconds: seconds spent so far.
        num_functions: number of functions compiled so far: a forward with its backward is one.
    """

    sizes: Sequence[int]
    device: torch.device
    seconds: float = 0.0
    num_functions: int = 0
    _functions: dict[Any, list[CompiledFunction]] = field(default_factory=dict)

    def compile(self, layer: Layer, before: Sequence[TensorSpec], variants: Iterable[CompileVariant]) -> None:
        """Compile a layer, and set `Layer.compiled`.

        Args:
            layer: layer whose tensors may be on the meta device; mode and tensors stay as they are.
            before: boundary before the layer.
            variants: ways in which the layer is run.

        Raises:
            ConfigError: the compiler cannot compile the layer, or hooks look at its gradients.
        """
        began = time.monotonic()
        modes = {module: module.training for module in layer.module.modules()}
        try:
            with layer.python_state_restored(), without_gradient_hooks(layer):
                functions = {variant: self._compile_variant(layer, before, variant) for variant in variants}
            layer.compiled = CompiledLayer(layer, before, functions)
        except ConfigError:
            raise
        except Exception as error:  # whatever a compiler may raise over a user's layer
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"--compile: PyTorch's compiler cannot compile layer {layer.name!r}: {type(error).__name__}: {reason}; leave --compile out"
            ) from error
        finally:
            for module, training in modes.items():
                module.training = training
            self.seconds += time.monotonic() - began

    def _compile_variant(self, layer: Layer, before: Sequence[TensorSpec], variant: CompileVariant) -> list[CompiledFunction]:
        traced = TracedLayer(layer, before, variant, max(self.sizes), self.device)
        if traced.key not in self._functions:
            functions = [traced.compile(self.sizes)]
            left = {*self.sizes} - functions[0].sizes
            while left and len(functions) < _MAX_RANGES:
                size = max(left)
                functions.append(TracedLayer(layer, before, variant, size, self.device).compile(self.sizes))
                left -= functions[-1].sizes | {size}
            self._functions[traced.key] = functions
            self.num_functions += len(functions)
        return self._functions[traced.key]


def check_compiler() -> None:
    """Refuse `--compile` where nothing can be compiled, or nobody knows whether it can.

    Raises:
        ConfigError: this version of torch was not tested, or there is no C++ compiler.
    """
    version = str(torch.__version__)
    if ".".join(version.split(".")[:2]) not in _TESTED_TORCH:
        tested = ", ".join(f"{minor}.x" for minor in _TESTED_TORCH)
        raise ConfigError(
            f"--compile is tested with torch {tested}, and this is torch {version}; leave --compile out or install a tested version"
        )
    from torch._inductor import config, cpp_builder, exc

    # In this process: workers would each hold what it imports.
    config.compile_threads = 1
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        asked = ", ".join(name for name in config.cpp.cxx if name)
        raise ConfigError(
            f"--compile needs a C++ compiler, and {asked!r} does not run; install g++, name another one in CXX, or leave --compile out"
        ) from None
