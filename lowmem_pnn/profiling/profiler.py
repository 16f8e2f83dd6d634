"""The profiler: what each layer of a chain costs in memory, found with fake tensors: nothing is allocated.

Each layer runs alone on a bench (`lowmem_pnn.profiling.fake_run`), forward and backward, at two numbers of samples. Every moment of a run (the
end of an operation) is matched with the same moment of the other run, which gives its bytes as a straight line, and the highest of
these lines at any number of samples is the peak. A third number of samples checks it. The chain's own tensors are neither read nor
changed.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lowmem_pnn.device.kernel_memory import PRIMITIVE_CACHE_CAPACITY
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.model.fingerprint import layer_fingerprint
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.profiling.costs import Affine, Envelope, LayerCost, MemoryProfile, with_local_loss
from lowmem_pnn.profiling.fake_run import FEW, MANY, MORE, FakeRun, Found, Runs

Known = dict[Hashable, Found]
"""What was found of layers, by their layer_fingerprint, boundaries and device."""


def profile(
    chain: Chain,
    *,
    optimizers: Sequence[OptimizerSpec],
    device: torch.device,
    parts_ties: bool = False,
    per_layer_loss: bool = False,
    known: Known | None = None,
) -> MemoryProfile:
    """Find what every layer of a chain costs.

    Args:
        chain: its tensors may be on the meta device; they are not read.
        optimizers: at least one; of several the largest is counted for all.
        device: where the chain will run; kernels differ between devices in what they save.
        parts_ties: layers that share a tensor may come into different partitions; it is then counted with each of them.
        per_layer_loss: every layer goes back from its own head before the next one runs forward.
        known: what earlier profiles of the same model, under other methods, have found; it is added to. Chains must still be there.

    Returns:
        The costs, layer by layer. A tensor that several layers share is counted with the first of them.

    Raises:
        ConfigError: a layer does not run on such samples.
    """
    known = {} if known is None else known
    with _modes_kept(chain), torch.random.fork_rng(devices=[]):
        counted: set[int] = set()
        layers = []
        smallest = 1
        compiled_kernels: dict[Hashable, int] = {}
        shared: set[int] = set()
        repeated: dict[int, int] = {}
        repeated_bytes = 0
        for number, layer in enumerate(chain.layers):
            if parts_ties:
                again = _new(layer.parameters().values(), set())
                again = [tensor for tensor in again if id(tensor) in shared]
                repeated |= {id(tensor): _nbytes(tensor) for tensor in again if tensor.requires_grad}
                learnt = [tensor for tensor in again if tensor.requires_grad]
                repeated_bytes += sum(map(_nbytes, again)) + sum(map(_nbytes, learnt)) + _state_bytes(learnt, optimizers)
                counted = set()
            before, after = chain.boundaries[number], chain.boundaries[number + 1]
            learns_input = number > 0 and not per_layer_loss
            # Code is a layer's own: it may be for other uses than that of a layer which is alike.
            key = layer_fingerprint(layer), layer.compiled, before, after, device, learns_input
            if key not in known:
                known[key] = FakeRun(layer, before, after, device, learns_input).found()
            found = known[key]
            cost = _price(layer, found, counted, optimizers, before, after)
            layers.append(with_local_loss(cost) if per_layer_loss else cost)
            shared |= counted
            compiled_kernels |= found.compiled
            smallest = max(smallest, found.smallest)
    forbidden = {cut for first, last in chain.tied_ranges for cut in range(first + 1, last + 1)}
    return MemoryProfile(
        layers=tuple(layers),
        forbidden_cuts=() if parts_ties else tuple(sorted(forbidden)),
        optimizer=", ".join(dict.fromkeys(map(str, optimizers))),
        smallest_micro_batch=smallest,
        kernel_bytes=sum(sorted(compiled_kernels.values(), reverse=True)[:PRIMITIVE_CACHE_CAPACITY]),
        repeated_bytes=repeated_bytes,
        shared_bytes=sum(repeated.values()),
    )


def _price(
    layer: Layer,
    found: Found,
    counted: set[int],
    optimizers: Sequence[OptimizerSpec],
    before: tuple[TensorSpec, ...],
    after: tuple[TensorSpec, ...],
) -> LayerCost:
    """One layer's cost.

    Args:
        layer: the layer.
        found: of it, or of one that is alike.
        counted: identities of the tensors that layers before it have; this layer's are added.
        optimizers: that its parameters may have.
        before: the boundary that it takes.
        after: the boundary that it gives.
    """
    parameters = _new(layer.parameters().values(), counted)
    trainable = [parameter for parameter in parameters if parameter.requires_grad]

    def peak(moments: Callable[[Runs], list[int]]) -> Envelope:
        return Envelope.over(moment for sizes in found.runs for moment in fit_peak(*map(moments, sizes)).moments)

    kepts = [fit_peak(*([run.kept] for run in sizes)).moments[-1] for sizes in found.runs]
    kept = Affine(max(kept.fixed for kept in kepts), max(kept.per_sample for kept in kepts))
    return LayerCost(
        name=layer.name,
        num_params=sum(parameter.numel() for parameter in parameters),
        weight_bytes=sum(map(_nbytes, parameters)),
        buffer_bytes=sum(map(_nbytes, _new(layer.buffers().values(), counted))),
        gradient_bytes=sum(map(_nbytes, trainable)),
        optimizer_bytes=_state_bytes(trainable, optimizers),
        step_bytes=max((optimizer.step_bytes(parameter) for optimizer in optimizers for parameter in trainable), default=0),
        forward_peak=peak(lambda runs: runs.forward),
        kept=kept,
        backward_peak=peak(lambda runs: runs.backward),
        emit_peak=peak(lambda runs: runs.emit),
        input_bytes=Affine(0, sum(spec.sample_bytes for spec in before)),
        output_bytes=Affine(0, sum(spec.sample_bytes for spec in after)),
        forward_macs=found.macs,
    )


def fit_peak(few: list[int], more: list[int], many: list[int]) -> Envelope:
    """Bytes as a function of the number of samples, from those at `FEW`, `MORE` and `MANY` samples, moment by moment.

    Args:
        few: live bytes at the moments of a run.
        more: the same moments with more samples.
        many: with many, as a check.

    Returns:
        Exact where every moment grows in a straight line; else not below what was measured.
    """
    if len(few) != len(more):
        # Another algorithm at another size: only the peaks can be compared.
        few, more = [max(few)], [max(more)]
    moments = []
    for low, high in zip(few, more, strict=True):
        # Negative where a backward has freed more than it has made, so far.
        slope = -(-(high - low) // (MORE - FEW))
        moments.append(Affine(max(low - slope * FEW, high - slope * MORE), slope))
    missing = max(many) - Envelope(tuple(moments)).at(MANY)
    if missing > 0:
        moments.append(Affine(0, -(-max(many) // MANY)))
    return Envelope.over(moments)


@contextmanager
def _modes_kept(chain: Chain) -> Iterator[None]:
    """Put train and eval mode of every module back at the end."""
    modes = {module: module.training for layer in chain.layers for module in layer.module.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _new(tensors: Iterable[Tensor], counted: set[int]) -> list[Tensor]:
    """The tensors that were not counted yet, each once; they are from now on."""
    found = []
    for tensor in tensors:
        if id(tensor) not in counted:
            counted.add(id(tensor))
            found.append(tensor)
    return found


def _state_bytes(parameters: Sequence[Tensor], optimizers: Sequence[OptimizerSpec]) -> int:
    return max(sum(map(optimizer.state_bytes, parameters)) for optimizer in optimizers)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
