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

This file uses private modules of torch, which change between its minor versions: `check_compiler` refuses versions that were not
tested.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.call_form import TensorSpec, ask_for_gradients
from lowmem_pnn.model.layer import Layer, is_of_head

# Minor versions of torch with which the tests of this file have passed.
_TESTED_TORCH = ("2.14",)

# Functions, each for a range of numbers of samples, that a graph may have; at any other number layers run as modules.
_MAX_RANGES = 3

# Operations that PyTorch's own kernels do better: the gradient of an embedding in a fixed order, whatever the threads; that of ReLU from
# its result, which is there anyway, where the compiler would write a mask, slowly (3.5 ms for 262,144 elements, where ReLU takes 0.4).
_NOT_DECOMPOSED = frozenset({torch.ops.aten.embedding_dense_backward.default, torch.ops.aten.threshold_backward.default})


@dataclass(frozen=True)
class CompileVariant:
    """A way to run a layer that is compiled by itself.

    Args:
        trains: whether the layer runs in train mode and with gradients; else in eval mode and without.
        learns_input: whether inputs have gradients too.
    """

    trains: bool
    learns_input: bool = False


@dataclass(frozen=True, eq=False)
class CompiledFunction:
    """A function that the compiler made of a traced layer.

    Args:
        call: function of a layer's tensors and its inputs; differentiable where it was compiled for training. Buffers change in place.
        sizes: numbers of samples that the function holds for.
        modules: global names of the generated modules, forward and backward.
    """

    call: Callable[..., Sequence[Tensor]]
    sizes: frozenset[int]
    modules: tuple[dict[str, Any], ...]


class CompiledLayer:
    """A layer's compiled functions, in the place of its module's forward.

    Args:
        layer: layer whose tensors are the functions' arguments.
        before: boundary before the layer.
        functions: for each variant, the functions for ranges of numbers of samples.
    """

    def __init__(
        self, layer: Layer, before: Sequence[TensorSpec], functions: Mapping[CompileVariant, Sequence[CompiledFunction]]
    ) -> None:
        self._shapes = [spec.shape for spec in before]
        self._names = tuple(_own_tensors(layer))
        self._channels_last = layer.precision.channels_last
        self._functions = dict(functions)

    def __call__(self, trains: bool, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Run the function for these inputs.

        Args:
            trains: whether the layer is in train mode.
            tensors: parameters and buffers of the layer, by name.
            inputs: tensors of the boundary before the layer, each (B, ...).

        Returns:
            Tensors of the boundary after the layer; None where no function holds: another number of samples, or of axes; eval mode
            with gradients.
        """
        function = self._function_for(trains, inputs)
        if function is None:
            return None
        arguments = [
            *(tensors[name] for name in self._names),
            *(_contiguous(tensor, self._channels_last) for tensor in inputs),
        ]
        if torch.is_grad_enabled() or not trains:
            return tuple(function.call(*arguments))
        # The same function as with gradients, so that a recomputed forward gives the same bits.
        with torch.enable_grad():
            return tuple(tensor.detach() for tensor in function.call(*arguments))

    def _function_for(self, trains: bool, inputs: tuple[Tensor, ...]) -> CompiledFunction | None:
        with_gradients = torch.is_grad_enabled()
        if not trains and with_gradients:
            return None
        if [tuple(tensor.shape[1:]) for tensor in inputs] != self._shapes:
            return None  # rows of a last layer in chunks
        learns_input = trains and (not with_gradients or any(tensor.requires_grad for tensor in inputs))
        functions = self._functions.get(CompileVariant(trains, learns_input))
        if functions is None and trains and (not with_gradients or not learns_input):
            # Gradients of inputs that nobody asks for are dropped; a forward without any needs none.
            functions = self._functions.get(CompileVariant(trains, not learns_input))
        size = len(inputs[0])
        return next((function for function in functions or () if size in function.sizes), None)

    @contextmanager
    def accepting_fake_tensors(self) -> Iterator[None]:
        """Have the generated modules allocate, and call PyTorch, but run none of their own kernels: so they accept fake tensors."""
        with ExitStack() as stack:
            for functions in self._functions.values():
                for function in functions:
                    for names in function.modules:
                        stack.enter_context(_without_kernels(names))
            yield


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
            ConfigError: the compiler cannot compile the layer.
        """
        began = time.monotonic()
        modes = {module: module.training for module in layer.module.modules()}
        try:
            layer.compiled = CompiledLayer(
                layer, before, {variant: self._compile_variant(layer, before, variant) for variant in variants}
            )
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
        traced = _TracedLayer(layer, before, variant, max(self.sizes), self.device)
        if traced.key not in self._functions:
            functions = [traced.compile(self.sizes)]
            left = {*self.sizes} - functions[0].sizes
            while left and len(functions) < _MAX_RANGES:
                size = max(left)
                functions.append(_TracedLayer(layer, before, variant, size, self.device).compile(self.sizes))
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


class _TracedLayer:
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
        from torch._dynamo.source import ConstantSource
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

        self._trains = variant.trains
        self._shapes = ShapeEnv()
        source = ConstantSource("samples")
        self._symbol = self._shapes.create_symbol(size, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
        samples = self._shapes.create_symintnode(self._symbol, hint=size, source=source)
        own = _own_tensors(layer)
        with FakeTensorMode(shape_env=self._shapes, allow_non_fake_inputs=True):
            tensors = [
                torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device).requires_grad_(like.requires_grad)
                for like in own.values()
            ]
            inputs = [
                _contiguous(torch.empty((samples, *spec.shape), dtype=spec.dtype, device=device), layer.precision.channels_last)
                for spec in before
            ]
            ask_for_gradients(inputs, before, variant.learns_input)
        self._arguments = [*tensors, *inputs]

        names = {id(tensor): name for name, tensor in own.items()}
        all_tensors = {**layer.parameters(), **layer.buffers()}
        aliases = {alias: names[id(tensor)] for alias, tensor in all_tensors.items() if id(tensor) in names}

        def run(*arguments: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(own, arguments, strict=False))
            with layer.precision.autocast():
                inputs = layer.precision.to_memory_format(arguments[len(own) :])
                mapping = {alias: given[name] for alias, name in aliases.items()}
                outputs = torch.func.functional_call(layer.module, mapping, inputs, tie_weights=False)
            return tuple(_contiguous(tensor, layer.precision.channels_last) for tensor in outputs)

        layer.train(variant.trains)
        with torch.set_grad_enabled(variant.trains), torch.random.fork_rng(devices=[]), _size_oblivious():
            self._graph: fx.GraphModule = make_fx(run, _allow_non_fake_inputs=True)(*self._arguments)

    @property
    def key(self) -> Any:
        """Equality key of layers that share a function. A graph that holds tensors of its own equals no other."""
        holds_tensors = any(node.op == "get_attr" for node in self._graph.graph.nodes)
        shapes = tuple((tuple(map(str, tensor.shape)), tensor.dtype, tensor.requires_grad) for tensor in self._arguments)
        strides = tuple(tuple(map(str, tensor.stride())) for tensor in self._arguments)
        return self._graph.code, shapes, strides, self._trains, self._graph if holds_tensors else None

    def compile(self, sizes: Iterable[int]) -> CompiledFunction:
        """Compile the graph; it cannot be compiled twice.

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
            config.patch(compile_threads=1, fallback_random=True, layout_optimization=False),
            # Backward is compiled now, not when it is first needed; and a cache of both together would bypass `inner`.
            autograd_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
            nullcontext() if self._trains else torch.no_grad(),
            _size_oblivious(),
        ):
            table = {operation: how for operation, how in select_decomp_table().items() if operation not in _NOT_DECOMPOSED}
            call: Any = compile_fx.compile_fx(self._graph, self._arguments, inner_compile=inner, decompositions=table)
        bounds = self._shapes.var_to_range[self._symbol]
        holds = frozenset(
            size
            for size in sizes
            if bounds.lower <= size <= bounds.upper
            and all(bool(guard.expr.subs(self._symbol, size)) for guard in self._shapes.guards)
        )
        return CompiledFunction(call, holds, tuple(module.current_callable.__globals__ for module in modules))


def _size_oblivious() -> AbstractContextManager[Any]:
    """Return a context in which the compiler takes a number of samples for any number, 1 too, unless it has to know."""
    from torch.fx.experimental import _config

    if not hasattr(_config, "backed_size_oblivious"):  # before torch 2.7
        return nullcontext()
    patched: AbstractContextManager[Any] = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patched


def _own_tensors(layer: Layer) -> dict[str, Tensor]:
    """Return a layer's tensors, without its head's, each once, under its first name."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in {**layer.parameters(), **layer.buffers()}.items():
        if not is_of_head(name):
            tensors.setdefault(id(tensor), (name, tensor))
    return dict(tensors.values())


def _contiguous(tensor: Tensor, channels_last: bool) -> Tensor:
    """Return a tensor as compiled functions take and return it: contiguous, maps in one of their two memory formats."""
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last and tensor.dim() == 4 else tensor.contiguous()


@contextmanager
def _without_kernels(names: dict[str, Any]) -> Iterator[None]:
    """Change a generated module so that its allocations go through PyTorch's dispatcher, and its kernels do nothing.

    Args:
        names: global names of the module.
    """

    def do_nothing(*_: object) -> None:
        """Replace a kernel, or a check of real tensors."""

    changed: dict[str, Any] = {name: do_nothing for name in names if name.startswith(("cpp_", "assert_"))}
    changed["empty_strided_cpu"] = lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype)
    changed["reinterpret_tensor"] = torch.as_strided
    before = {name: names[name] for name in changed}
    names.update(changed)
    try:
        yield
    finally:
        names.update(before)
