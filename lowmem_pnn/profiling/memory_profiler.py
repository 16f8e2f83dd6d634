"""The profiler: the memory cost of each layer of a chain, measured with fake tensors; nothing is allocated.

Each layer runs alone (`lowmem_pnn.profiling.fake_run`), forward and backward, at two numbers of samples. Every moment of a run (the end
of an operation) is matched with the same moment of the other run, which gives its bytes as a straight line; the highest of these lines
at any number of samples is the peak. A third number of samples checks the peak. The chain's own tensors are neither read nor changed.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem_pnn.device.kernel_memory import PRIMITIVE_CACHE_CAPACITY
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.profiling.costs import Affine, Envelope, LayerCost, MemoryProfile, Tie, with_local_loss
from lowmem_pnn.profiling.fake_run import FEW, MANY, MORE, FakeRun, LayerMeasurement, MemoryTrace
from lowmem_pnn.profiling.fingerprint import lasts, layer_fingerprint
from lowmem_pnn.quantization.stored_weights import num_values

MeasurementCache = dict[Hashable, LayerMeasurement]
"""Measurements of layers, by their fingerprint, compiled code, boundaries, device and threads."""

_MOST_LASTING = 4096
_lasting: MeasurementCache = {}
"""Measurements of layers whose keys last: for the next plan or run of the process."""


def profile(
    chain: Chain,
    *,
    optimizers: Sequence[OptimizerSpec],
    device: torch.device,
    cuts_through_ties: bool = False,
    per_layer_loss: bool = False,
    cache: MeasurementCache | None = None,
) -> MemoryProfile:
    """Measure the memory cost of every layer of a chain.

    Args:
        chain: The chain; its tensors may be on the meta device, for they are not read.
        optimizers: Optimizers, at least one; of several the one with the largest state is counted for all layers.
        device: Device on which the chain will run; kernels of different devices save different tensors.
        cuts_through_ties: Whether layers that share a tensor may come into different partitions, unless a forward changes it; a shared
            buffer is then counted with each of these layers.
        per_layer_loss: Whether every layer runs backward from its own head before the next layer runs forward.
        cache: Measurements of earlier profiles of the same model under other methods, whose chains must still exist; new measurements
            are added.

    Returns:
        The costs, layer by layer. A parameter that several layers share is counted with each of them, and named in `LayerCost.ties`.

    Raises:
        ConfigError: A layer does not run on samples of its boundary.
    """
    cache = {} if cache is None else cache
    with _modes_restored(chain), torch.random.fork_rng(devices=[]):
        layers = []
        smallest, untouched, widest = 1, 0, 0
        compiled_kernels: dict[Hashable, int] = {}
        emitting_kernels: dict[Hashable, int] = {}
        ties = _ties_by_layer(chain, optimizers)
        learns_before = False  # else no gradient goes back through a layer's inputs
        for number, layer in enumerate(chain.layers):
            before, after = chain.boundaries[number], chain.boundaries[number + 1]
            learns_input = learns_before and not per_layer_loss
            learns_before |= any(parameter.requires_grad for parameter in layer.parameters().values())
            # Compiled code is the layer's own: that of an equal layer may be for other uses.
            learning = tuple(learns_input and spec.takes_gradient for spec in before)
            key = layer_fingerprint(layer), layer.compiled, before, after, device, learning, torch.get_num_threads()
            if key not in cache:
                run = partial(FakeRun, layer, before, after, device, learns_input)
                cache[key] = _measured(key, run) if layer.compiled is None else run().measure()
            measurement = cache[key]
            cost = _layer_cost(layer, measurement, optimizers, before, after, ties[number], device)
            layers.append(with_local_loss(cost) if per_layer_loss else cost)
            compiled_kernels |= measurement.compiled
            emitting_kernels |= measurement.emitting
            smallest = max(smallest, measurement.smallest)
            untouched, widest = max(untouched, measurement.untouched), max(widest, measurement.widest)
    # PyTorch's memory of what operations do to fake tensors: 7 MB for DenseNet-121.
    FakeTensorMode.cache_clear()
    tied = chain.moving_ranges if cuts_through_ties else chain.tied_ranges
    forbidden = {cut for first, last in tied for cut in range(first + 1, last + 1)}
    return MemoryProfile(
        layers=tuple(layers),
        forbidden_cuts=tuple(sorted(forbidden)),
        optimizer=", ".join(dict.fromkeys(map(str, optimizers))),
        smallest_micro_batch=smallest,
        kernel_bytes=_kept_bytes(compiled_kernels),
        emit_kernel_bytes=_kept_bytes(emitting_kernels),
        untouched_bytes=untouched,
        widest_product=widest,
        shared_bytes=sum(tie.gradient_bytes for own in ties for tie in own if tie.is_first) if cuts_through_ties else 0,
    )


def _measured(key: Hashable, run: Callable[[], FakeRun]) -> LayerMeasurement:
    """Return a layer's measurement, from an earlier profile where its key lasts."""
    if not lasts(key):
        return run().measure()
    if key not in _lasting:
        if len(_lasting) == _MOST_LASTING:
            del _lasting[next(iter(_lasting))]  # the oldest
        _lasting[key] = run().measure()
    return _lasting[key]


def _layer_cost(
    layer: Layer,
    measurement: LayerMeasurement,
    optimizers: Sequence[OptimizerSpec],
    before: tuple[TensorSpec, ...],
    after: tuple[TensorSpec, ...],
    ties: tuple[Tie, ...],
    device: torch.device,
) -> LayerCost:
    """Return the cost of one layer.

    Args:
        layer: The layer.
        measurement: Measurement of the layer, or of an equal one.
        optimizers: Optimizers that the layer's parameters may have.
        before: Boundary before the layer.
        after: Boundary after the layer.
        ties: Parameters that other layers hold too.
        device: Device on which the chain will run.
    """
    parameters = _not_yet_counted(layer.parameters().values(), set())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    sizes = num_values(layer.module)

    def peak(moments: Callable[[MemoryTrace], list[int]]) -> Envelope:
        return Envelope.over(moment for sizes in measurement.traces for moment in fit_peak(*map(moments, sizes)).moments)

    kepts = [fit_peak(*([trace.kept] for trace in sizes)).moments[-1] for sizes in measurement.traces]
    kept = Affine(max(kept.fixed for kept in kepts), max(kept.per_sample for kept in kepts))
    return LayerCost(
        name=layer.name,
        num_params=sum(sizes.get(id(parameter), parameter.numel()) for parameter in parameters),
        weight_bytes=sum(map(_nbytes, parameters)),
        buffer_bytes=sum(map(_nbytes, _not_yet_counted(layer.buffers().values(), set()))),
        gradient_bytes=sum(map(_nbytes, trainable)),
        optimizer_bytes=_state_bytes(trainable, optimizers),
        step_bytes=max(
            (optimizer.step_bytes(parameter, None, device) for optimizer in optimizers for parameter in trainable), default=0
        ),
        forward_peak=peak(lambda trace: trace.forward),
        kept=kept,
        backward_peak=peak(lambda trace: trace.backward),
        emit_peak=peak(lambda trace: trace.emit),
        input_bytes=Affine(0, sum(spec.sample_bytes for spec in before)),
        output_bytes=Affine(0, sum(spec.sample_bytes for spec in after)),
        forward_macs=measurement.macs,
        complete=peak(lambda trace: [trace.complete]),
        whole=layer.whole,
        ties=ties,
        products=measurement.products,
    )


def _ties_by_layer(chain: Chain, optimizers: Sequence[OptimizerSpec]) -> list[tuple[Tie, ...]]:
    """Return for each layer of a chain its parameters that other layers hold too."""
    own = [_not_yet_counted(layer.parameters().values(), set()) for layer in chain.layers]
    users: dict[int, list[int]] = {}
    for number, parameters in enumerate(own):
        for parameter in parameters:
            users.setdefault(id(parameter), []).append(number)
    numbers = {identity: number for number, identity in enumerate(users)}

    def tie(parameter: Tensor, layer: int) -> Tie:
        layers, trainable = users[id(parameter)], [parameter] if parameter.requires_grad else []
        return Tie(
            number=numbers[id(parameter)],
            is_first=layer == layers[0],
            is_last=layer == layers[-1],
            num_params=parameter.numel(),
            weight_bytes=_nbytes(parameter),
            gradient_bytes=sum(map(_nbytes, trainable)),
            optimizer_bytes=_state_bytes(trainable, optimizers),
        )

    return [tuple(tie(one, number) for one in parameters if len(users[id(one)]) > 1) for number, parameters in enumerate(own)]


def fit_peak(few: list[int], more: list[int], many: list[int]) -> Envelope:
    """Fit the peak as a function of the number of samples, from the bytes at `FEW`, `MORE` and `MANY` samples, moment by moment.

    Args:
        few: Live bytes at the moments of a run with few samples.
        more: Live bytes at the same moments with more samples.
        many: Live bytes with many samples, as a check.

    Returns:
        The peak: exact where every moment grows in a straight line, else at least the measured bytes.
    """
    if len(few) != len(more):
        # A kernel takes another algorithm at another size: only the peaks can be compared.
        few, more = [max(few)], [max(more)]
    moments = []
    for low, high in zip(few, more, strict=True):
        # Negative where a backward has freed more than it has made so far.
        slope = -(-(high - low) // (MORE - FEW))
        moments.append(Affine(max(low - slope * FEW, high - slope * MORE), slope))
    missing = max(many) - Envelope(tuple(moments)).at(MANY)
    if missing > 0:
        moments.append(Affine(0, -(-max(many) // MANY)))
    return Envelope.over(moments)


@contextmanager
def _modes_restored(chain: Chain) -> Iterator[None]:
    """Restore the train or eval mode of every module, and what forwards leave in them, at the end."""
    modes = {module: module.training for layer in chain.layers for module in layer.module.modules()}
    try:
        with chain.python_state_restored():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _not_yet_counted(tensors: Iterable[Tensor], counted: set[int]) -> list[Tensor]:
    """Return the tensors that are not counted yet, each once, and count them."""
    fresh = []
    for tensor in tensors:
        if id(tensor) not in counted:
            counted.add(id(tensor))
            fresh.append(tensor)
    return fresh


def _kept_bytes(kernels: Mapping[Hashable, int]) -> int:
    return sum(sorted(kernels.values(), reverse=True)[:PRIMITIVE_CACHE_CAPACITY])


def _state_bytes(parameters: Sequence[Tensor], optimizers: Sequence[OptimizerSpec]) -> int:
    return max(sum(map(optimizer.state_bytes, parameters)) for optimizer in optimizers)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
