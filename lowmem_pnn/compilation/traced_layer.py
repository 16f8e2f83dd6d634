"""A traced layer: forward and backward as a graph of PyTorch's operations, by which equal layers are found, and which is compiled.

The backward of a layer that trains is traced through the module itself, by autograd: what a `detach`, `torch.no_grad` or the `backward` of
a `torch.autograd.Function` makes of gradients is no operation of the forward, and a graph of that alone would have other gradients.

This file uses private modules of torch, as `compiler.py` says.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowmem_pnn.compilation.compiled_layer import CompiledFunction, CompileVariant, contiguous, own_tensors
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.call_form import TensorSpec, ask_for_gradients
from lowmem_pnn.model.layer import Layer

# Operations that PyTorch's own kernels do better: the gradient of an embedding in a fixed order, whatever the threads; that of ReLU from
# its result, which is there anyway, where the compiler would write a mask, slowly (3.5 ms for 262,144 elements, where ReLU takes 0.4).
_NOT_DECOMPOSED = frozenset({torch.ops.aten.embedding_dense_backward.default, torch.ops.aten.threshold_backward.default})


class TracedLayer:
    """A layer as a graph of PyTorch's operations, all of its tensors being arguments.

    Args:
        layer: the layer.
        before: boundary before the layer.
        variant: way in which the layer is run.
        size: number of samples to decide by where the compiler has to.
        device: device that the layer runs on.
    """

    def __init__(
        self, layer: Layer, before: Sequence[TensorSpec], variant: CompileVariant, size: int, device: torch.device
    ) -> None:
        from torch._dispatch.python import no_python_dispatcher
        from torch._dynamo.source import ConstantSource
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

        self._trains = variant.trains
        self._shapes = ShapeEnv()
        source = ConstantSource("samples")
        self._symbol = self._shapes.create_symbol(size, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
        samples = self._shapes.create_symintnode(self._symbol, hint=size, source=source)
        own = own_tensors(layer)
        with FakeTensorMode(shape_env=self._shapes, allow_non_fake_inputs=True):
            tensors = [
                torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device).requires_grad_(like.requires_grad)
                for like in own.values()
            ]
            inputs = [
                contiguous(torch.empty((samples, *spec.shape), dtype=spec.dtype, device=device), layer.precision.channels_last)
                for spec in before
            ]
            ask_for_gradients(inputs, before, variant.learns_input)
        self._arguments = [*tensors, *inputs]

        names = {id(tensor): name for name, tensor in own.items()}
        all_tensors = {**layer.parameters(), **layer.buffers()}
        aliases = {alias: names[id(tensor)] for alias, tensor in all_tensors.items() if id(tensor) in names}

        def run(*arguments: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(own, arguments, strict=False))
            mapping = {alias: given[name] for alias, name in aliases.items()}
            # The compiler's dispatcher would take other operations for a few, as for dropout, than PyTorch takes without a compiler.
            with no_python_dispatcher():
                outputs = layer.run_on(mapping, *arguments[len(own) :])
            replaced = {name: mapping[alias].detach() for alias, name in aliases.items() if mapping[alias] is not given[name]}
            self._replaced = tuple(number for number, name in enumerate(own) if name in replaced)
            made = [contiguous(tensor, layer.precision.channels_last) for tensor in outputs]
            return *made, *(replaced[name] for name in own if name in replaced)

        def run_and_back(*arguments: Tensor) -> tuple[Tensor | None, ...]:
            outputs = run(*arguments)
            self._num_outputs = len(outputs)
            ends = [tensor for tensor in outputs if tensor.requires_grad]
            if not ends:
                return outputs
            learning = [tensor for tensor in arguments if tensor.requires_grad]
            return *outputs, *torch.autograd.grad(ends, learning, [torch.ones_like(end) for end in ends], allow_unused=True)

        layer.train(variant.trains)
        with torch.set_grad_enabled(variant.trains), torch.random.fork_rng(devices=[]), _size_oblivious():
            # With a table, though an empty one: without any `detach` becomes an operation that gradients go through.
            traced = make_fx(run_and_back, decomposition_table={}, _allow_non_fake_inputs=True)(*self._arguments)
        self._traced: fx.GraphModule = traced
        self._run = run

    @property
    def key(self) -> Any:
        """Equality key of layers that share a function. A graph that holds tensors of its own equals no other."""
        holds_tensors = any(node.op == "get_attr" for node in self._traced.graph.nodes)
        shapes = tuple((tuple(map(str, tensor.shape)), tensor.dtype, tensor.requires_grad) for tensor in self._arguments)
        strides = tuple(tuple(map(str, tensor.stride())) for tensor in self._arguments)
        return self._traced.code, self._replaced, shapes, strides, self._trains, self._traced if holds_tensors else None

    def _calling(self, module: nn.Module) -> fx.GraphModule:
        """Return a graph of one node, which calls the layer: autograd, which the compiler traces, goes through the module."""
        graph = fx.Graph()
        arguments = tuple(graph.placeholder(f"argument_{number}") for number in range(len(self._arguments)))
        outputs = graph.call_module("layer", arguments)
        graph.output(tuple(graph.call_function(operator.getitem, (outputs, number)) for number in range(self._num_outputs)))
        return fx.GraphModule({"layer": module}, graph)

    def compile(self, sizes: Iterable[int]) -> CompiledFunction:
        """Compile the layer, once.

        Args:
            sizes: numbers of samples that the function may be for.
        """
        from torch._functorch import config as autograd_config
        from torch._inductor import compile_fx, config, lowering
        from torch._inductor.decomposition import select_decomp_table

        for operation in _NOT_DECOMPOSED:
            if operation not in lowering.lowerings:
                # Declared beforehand: where the variable CI is set, the compiler refuses an operation without a lowering.
                lowering.make_fallback(operation, warn=False, override_decomp=True)
        modules: list[Any] = []
        # Strides of the tensors that forward keeps are passed to backward as numbers, for one number of samples; as symbols they hold
        # for all.
        self._shapes.evaluate_symexpr = self._shapes.deserialize_symexpr  # type: ignore[assignment, method-assign]

        def inner(*arguments: Any, **options: Any) -> Any:
            modules.append(compile_fx.compile_fx_inner(*arguments, **options))
            return modules[-1]

        with (
            # Random numbers as without compiling, so that a generator's state can be saved and restored; maps in the layer's memory
            # format: the compiler would keep copies of weights in the other order.
            config.patch(compile_threads=1, fallback_random=True, layout_optimization=False, use_pre_grad_passes=False),
            # Backward is compiled now, not when it is first needed; and a cache of both together would bypass `inner`.
            autograd_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
            nullcontext() if self._trains else torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            _size_oblivious(),
        ):
            table = {operation: how for operation, how in select_decomp_table().items() if operation not in _NOT_DECOMPOSED}
            layer = _Call(self._run)
            call: Any = compile_fx.compile_fx(self._calling(layer), self._arguments, inner_compile=inner, decompositions=table)
        layer.forward = None  # the function holds on to the graph, and is not to hold on to this layer
        bounds = self._shapes.var_to_range[self._symbol]
        holds = frozenset(
            size
            for size in sizes
            if bounds.lower <= size <= bounds.upper
            and all(bool(guard.expr.subs(self._symbol, size)) for guard in self._shapes.guards)
        )
        return CompiledFunction(call, self._replaced, holds, tuple(module.current_callable.__globals__ for module in modules))


class _Call(nn.Module):
    """A function as a module without tensors.

    Args:
        forward: the function.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.forward: Any = forward


@contextmanager
def without_gradient_hooks(layer: Layer) -> Iterator[None]:
    """Refuse hooks on what a layer computes that look at gradients: compiled code would call them once, while it is traced."""
    error = ConfigError(
        f"--compile: hooks look at gradients inside layer {layer.name!r}, and compiled code would not call them; leave --compile out"
    )
    if any(module._backward_hooks or module._backward_pre_hooks for module in layer.module.modules()):
        raise error

    def refuse(*_: object) -> None:
        raise error

    register = Tensor.register_hook
    Tensor.register_hook = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.register_hook = register  # type: ignore[method-assign]


def _size_oblivious() -> AbstractContextManager[Any]:
    """Return a context in which the compiler takes a number of samples for any number, 1 too, unless it has to know."""
    from torch.fx.experimental import _config

    if not hasattr(_config, "backed_size_oblivious"):  # before torch 2.7
        return nullcontext()
    patched: AbstractContextManager[Any] = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patched
