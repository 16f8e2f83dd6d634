"""Compiling: layers as code that PyTorch's compiler makes, once for all layers that come to the same program.

    layer --traced on fake tensors--> program --text and shapes known?--> the code that is there
                                              --new?--> TorchInductor, forward and backward --> code

It is `torch.compile` without its first half: Dynamo finds graphs in Python code and guards the objects that it saw there, but a layer
is a graph already, and every residency gives it other objects. So a program takes all of a layer's tensors as arguments, in order, and
whichever layer has the same program calls the same code with its own. The number of samples stays a symbol: code does not depend on a
plan, and is not made again for the rest of a batch. Where the compiler decides something by it, the code holds for a range of numbers,
and the others get code of their own. One sample alone is such a case in most layers: it is left to the layer as it is.

All is compiled before training, on fake tensors: nothing is allocated or run, and what the compiler takes is no training memory.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.model.layer import Layer, is_of_head

# Codes for ranges of numbers of samples that a program may have; layers run as they are at any other number.
_MAX_RANGES = 3

# What PyTorch's own kernels do better: the gradient of an embedding in a fixed order, whatever the threads; that of ReLU from its result,
# which is there anyway, where the compiler would write a mask, slowly (3.5 ms for 262,144 elements, where ReLU takes 0.4).
_LEFT_WHOLE = frozenset({torch.ops.aten.embedding_dense_backward.default, torch.ops.aten.threshold_backward.default})


@dataclass(frozen=True)
class Use:
    """A way in which layers are run, which has code of its own.

    Args:
        trains: in train mode and with gradients; else in eval mode and without.
        learns_input: whether inputs have gradients too.
    """

    trains: bool
    learns_input: bool = False


@dataclass(frozen=True, eq=False)
class Code:
    """What the compiler made of a program.

    Args:
        call: takes a layer's tensors and its inputs; differentiable where it was made for training. Buffers change in place.
        sizes: the numbers of samples that it holds for.
        modules: the global names of the generated modules, forward and backward.
    """

    call: Callable[..., Sequence[Tensor]]
    sizes: frozenset[int]
    modules: tuple[dict[str, Any], ...]


class CompiledLayer:
    """A layer's code for every use, in the place of its module's forward.

    Args:
        layer: whose tensors it takes.
        before: the boundary that it takes.
        codes: for each use, by ranges.
    """

    def __init__(self, layer: Layer, before: Sequence[TensorSpec], codes: Mapping[Use, Sequence[Code]]) -> None:
        self._shapes = [spec.shape for spec in before]
        self._names = tuple(_own_tensors(layer))
        self._numerics = layer.precision
        self._codes = dict(codes)

    def __call__(self, trains: bool, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Run it.

        Args:
            trains: whether the layer is in train mode.
            tensors: its parameters and buffers, by name.
            inputs: of the boundary before it, each (B, ...).

        Returns:
            The boundary after it; None where there is no code for that: another number of samples, or of axes; eval mode with gradients.
        """
        code = self._code_for(trains, inputs)
        if code is None:
            return None
        arguments = [
            *(tensors[name] for name in self._names),
            *(_regular(tensor, self._numerics.channels_last) for tensor in inputs),
        ]
        if torch.is_grad_enabled() or not trains:
            return tuple(code.call(*arguments))
        # The same code as with gradients, so that a forward that will be done again gives the same bits.
        with torch.enable_grad():
            return tuple(tensor.detach() for tensor in code.call(*arguments))

    def _code_for(self, trains: bool, inputs: tuple[Tensor, ...]) -> Code | None:
        with_gradients = torch.is_grad_enabled()
        if not trains and with_gradients:
            return None
        if [tuple(tensor.shape[1:]) for tensor in inputs] != self._shapes:
            return None  # rows of a last layer in chunks
        learns_input = trains and (not with_gradients or any(tensor.requires_grad for tensor in inputs))
        codes = self._codes.get(Use(trains, learns_input))
        if codes is None and trains and (not with_gradients or not learns_input):
            # Gradients of inputs that nobody asks for are dropped; a forward without any needs none.
            codes = self._codes.get(Use(trains, not learns_input))
        size = len(inputs[0])
        return next((code for code in codes or () if size in code.sizes), None)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Have the generated code allocate, and call PyTorch, but run none of its own kernels: so it can be given fake tensors."""
        with ExitStack() as stack:
            for codes in self._codes.values():
                for code in codes:
                    for names in code.modules:
                        stack.enter_context(_without_kernels(names))
            yield


@dataclass
class Compiler:
    """Compiles layers, and knows what it has compiled.

    Args:
        sizes: the numbers of samples that occur.
        device: where layers run.
        seconds: spent so far.
        num_functions: codes made so far: a forward with its backward is one.
    """

    sizes: Sequence[int]
    device: torch.device
    seconds: float = 0.0
    num_functions: int = 0
    _known: dict[Any, list[Code]] = field(default_factory=dict)

    def compile(self, layer: Layer, before: Sequence[TensorSpec], uses: Iterable[Use]) -> None:
        """Give a layer code.

        Args:
            layer: its tensors may be on the meta device; mode and tensors stay as they are.
            before: the boundary that it takes.
            uses: in which it is run.

        Raises:
            ConfigError: the compiler cannot make code of it.
        """
        began = time.monotonic()
        modes = {module: module.training for module in layer.module.modules()}
        try:
            layer.compiled = CompiledLayer(layer, before, {use: self._codes(layer, before, use) for use in uses})
        except Exception as error:  # whatever a compiler may raise over a user's layer
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"--compile: PyTorch's compiler makes no code of layer {layer.name!r}: {type(error).__name__}: {reason}; leave --compile out"
            ) from error
        finally:
            for module, training in modes.items():
                module.training = training
            self.seconds += time.monotonic() - began

    def _codes(self, layer: Layer, before: Sequence[TensorSpec], use: Use) -> list[Code]:
        program = _Program(layer, before, use, max(self.sizes), self.device)
        if program.key not in self._known:
            codes = [program.compile(self.sizes)]
            left = {*self.sizes} - codes[0].sizes
            while left and len(codes) < _MAX_RANGES:
                size = max(left)
                codes.append(_Program(layer, before, use, size, self.device).compile(self.sizes))
                left -= codes[-1].sizes | {size}
            self._known[program.key] = codes
            self.num_functions += len(codes)
        return self._known[program.key]


def check_compiler() -> None:
    """Refuse to begin where nothing can be compiled.

    Raises:
        ConfigError: there is no C++ compiler.
    """
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


class _Program:
    """A layer as a graph of PyTorch's operations, all of its tensors being arguments.

    Args:
        layer: the layer.
        before: the boundary that it takes.
        use: how it is run.
        size: a number of samples, to decide by where the compiler has to.
        device: where it runs.
    """

    def __init__(self, layer: Layer, before: Sequence[TensorSpec], use: Use, size: int, device: torch.device) -> None:
        from torch._dynamo.source import ConstantSource
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

        self._trains = use.trains
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
                _regular(torch.empty((samples, *spec.shape), dtype=spec.dtype, device=device), layer.precision.channels_last)
                for spec in before
            ]
            for tensor in inputs:
                tensor.requires_grad_(use.learns_input and tensor.is_floating_point())
        self._arguments = [*tensors, *inputs]

        names = {id(tensor): name for name, tensor in own.items()}
        everything = {**layer.parameters(), **layer.buffers()}
        aliases = {alias: names[id(tensor)] for alias, tensor in everything.items() if id(tensor) in names}

        def run(*arguments: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(own, arguments, strict=False))
            with layer.precision.autocast():
                laid_out = layer.precision.to_memory_format(arguments[len(own) :])
                mapping = {alias: given[name] for alias, name in aliases.items()}
                outputs = torch.func.functional_call(layer.module, mapping, laid_out, tie_weights=False)
            return tuple(_regular(tensor, layer.precision.channels_last) for tensor in outputs)

        layer.module.train(use.trains)
        with torch.set_grad_enabled(use.trains), torch.random.fork_rng(devices=[]), _few_ranges():
            self._graph: fx.GraphModule = make_fx(run, _allow_non_fake_inputs=True)(*self._arguments)

    @property
    def key(self) -> Any:
        """What equal programs have in common. One that holds tensors of its own is like no other."""
        holds = any(node.op == "get_attr" for node in self._graph.graph.nodes)
        shapes = tuple((tuple(map(str, tensor.shape)), tensor.dtype, tensor.requires_grad) for tensor in self._arguments)
        strides = tuple(tuple(map(str, tensor.stride())) for tensor in self._arguments)
        return self._graph.code, shapes, strides, self._trains, id(self) if holds else None

    def compile(self, sizes: Iterable[int]) -> Code:
        """Its code; the program is used up.

        Args:
            sizes: numbers of samples that the code may be for.
        """
        from torch._functorch import config as autograd_config
        from torch._inductor import compile_fx, config, lowering
        from torch._inductor.decomposition import select_decomp_table

        for operation in _LEFT_WHOLE:
            if operation not in lowering.lowerings:
                # Said beforehand: where the variable CI is set, the compiler refuses to find out by itself.
                lowering.make_fallback(operation, warn=False, override_decomp=True)
        made: list[Any] = []
        # How what forward keeps lies in memory is told to backward as numbers, for one number of samples; as symbols it holds for all.
        self._shapes.evaluate_symexpr = self._shapes.deserialize_symexpr  # type: ignore[assignment, method-assign]

        def inner(*arguments: Any, **options: Any) -> Any:
            made.append(compile_fx.compile_fx_inner(*arguments, **options))
            return made[-1]

        with (
            # Random numbers as without compiling, so that a generator's state can be kept and gone back to; maps lie as the layer's
            # precision say: the compiler would keep copies of weights in the other order.
            config.patch(compile_threads=1, fallback_random=True, layout_optimization=False),
            # Backward is compiled now, not when it is first needed; and a cache of both together would not show them.
            autograd_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
            nullcontext() if self._trains else torch.no_grad(),
            _few_ranges(),
        ):
            table = {operation: how for operation, how in select_decomp_table().items() if operation not in _LEFT_WHOLE}
            call: Any = compile_fx.compile_fx(self._graph, self._arguments, inner_compile=inner, decompositions=table)
        bounds = self._shapes.var_to_range[self._symbol]
        holds = frozenset(
            size
            for size in sizes
            if bounds.lower <= size <= bounds.upper
            and all(bool(guard.expr.subs(self._symbol, size)) for guard in self._shapes.guards)
        )
        modules = tuple(compiled.current_callable.__globals__ for compiled in made)
        return Code(call, holds, modules)


def _few_ranges() -> AbstractContextManager[Any]:
    """Where the compiler takes a number of samples for any number, 1 too, unless it has to know."""
    from torch.fx.experimental import _config

    patched: AbstractContextManager[Any] = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patched


def _own_tensors(layer: Layer) -> dict[str, Tensor]:
    """A layer's tensors, without its head's, each once, under its first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in {**layer.parameters(), **layer.buffers()}.items():
        if not is_of_head(name):
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _regular(tensor: Tensor, channels_last: bool) -> Tensor:
    """A tensor as code takes it and gives it: contiguous, in one of the two orders that maps have."""
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last and tensor.dim() == 4 else tensor.contiguous()


@contextmanager
def _without_kernels(names: dict[str, Any]) -> Iterator[None]:
    """A generated module whose allocations go through PyTorch's dispatcher, and whose kernels do nothing.

    Args:
        names: its global names.
    """

    def nothing(*_: object) -> None:
        """In the place of a kernel, or of a check of real tensors."""

    changed: dict[str, Any] = {name: nothing for name in names if name.startswith(("cpp_", "assert_"))}
    changed["empty_strided_cpu"] = lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype)
    changed["reinterpret_tensor"] = torch.as_strided
    before = {name: names[name] for name in changed}
    names.update(changed)
    try:
        yield
    finally:
        names.update(before)
