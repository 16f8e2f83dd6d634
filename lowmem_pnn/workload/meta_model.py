"""Meta models: a thin model of the whole, one thin part for each partition of a plan, as a workload of its own."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lowmem_pnn.capture.capture import capture
from lowmem_pnn.config.configure import for_method
from lowmem_pnn.config.fit_config import FitConfig, default_of
from lowmem_pnn.errors import CaptureError, ConfigError
from lowmem_pnn.methods import make_method
from lowmem_pnn.methods.thin_parts import CopiedLayer, GivenAs, make_thin_part
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.model.precision import Precision
from lowmem_pnn.seeds import seed_of, seeded
from lowmem_pnn.workload.workload import Workload
from lowmem_pnn.zoo.deferred_init import skeleton
from lowmem_pnn.zoo.model_source import ModelSource

Spans = Sequence[tuple[int, int]]
"""First layer of each partition, and the layer after its last."""


@dataclass(frozen=True)
class MetaModel:
    """A thin model of the whole.

    Args:
        workload: the meta model, trained as one partition, on the data of the run.
        parts: each thin part as a chain of its own; the meta model calls its tensors PART.NAME.
    """

    workload: Workload
    parts: tuple[Chain, ...]

    def tail(self, partition: int) -> list[tuple[int, Layer]]:
        """Return the layers of the thin parts after a partition, each with the number of its part."""
        return [(number, layer) for number in range(partition + 1, len(self.parts)) for layer in self.parts[number].layers]


def meta_model(workload: Workload, spans: Spans) -> MetaModel:
    """Make the meta model of a plan, without its weights; the same one for the same workload and cuts.

    A thin part is a copy of the partition's first layer where that has weights and gives what all of the partition's layers give; else
    the cheapest layer that goes from one boundary to the other (`methods.thin_parts`). Where there is none, as from tokens, which are
    numbers, such a layer follows a copy of the first one.

    Args:
        workload: model, data and method of the run.
        spans: partitions, at least two.

    Raises:
        ConfigError: there is no thin part for one of the partitions.
    """
    known: dict[tuple[tuple[int, int], ...], MetaModel] = workload.meta_models
    if (key := tuple(spans)) not in known:
        known[key] = _make(workload, spans)
    return known[key]


def meta_config(config: FitConfig) -> FitConfig:
    """Return the options of the meta model's training: those of the first partition, by ordinary training.

    What is for other partitions or for recovery is left out, and so are patterns of the model's parameters, whose names it has not.

    Args:
        config: options of the run.
    """
    one = {name: getattr(config, name)[:1] for name in ("batch_size", "optimizer", "lr", "shuffle")}
    size = config.micro_batch
    config = dataclasses.replace(
        config,
        recovery_epochs=0,
        recover=None,
        early_stop=None,
        keep_weights="last",
        recompute=default_of("recompute"),
        views=1,
        sample=None,
        micro_batch=None if size is None else min(size, *one["batch_size"]),
        min_lr=min(config.min_lr, *one["lr"]),
        no_decay=None,
        lr_for={},
        **one,
    )
    return dataclasses.replace(for_method(config, "backprop"), epochs=(config.num_meta_epochs,), meta_epochs=None)


def _make(workload: Workload, spans: Spans) -> MetaModel:
    chain, config = workload.chain, meta_config(workload.config)
    _check_boundaries(workload, spans)
    # What is copied of the model is as the options have it; what is made beside it is kept as it is.
    source = ModelSource(
        f"meta-{workload.source.name}",
        f"the meta model of {workload.source.spec}",
        _Builder(workload, spans),
        "any",
        is_prepared=True,
    )
    precision = chain.layers[0].precision
    whole = _captured(workload, source.build, chain.boundaries[0][0], precision)
    builder, parts = _Builder(workload, spans), []
    for number, (start, stop) in enumerate(spans):
        (before,), (after,) = chain.boundaries[start], chain.boundaries[stop]
        part = _captured(workload, lambda number=number: builder.part(number, None), before, precision)
        if part.boundaries[-1] != (after,):
            raise ConfigError(
                f"--method incubate: the thin part from layer {chain.layers[start].name!r} on gives {part.boundaries[-1][0]}, and its "
                f"partition gives {after}; give other --cuts"
            )
        parts.append(part)
    meta = dataclasses.replace(
        workload,
        config=config,
        source=source,
        method=make_method(config),
        chain=whole,
        bare=whole,
        pretrained=None,
        early=None,
        parts=None,
    )
    return MetaModel(meta, tuple(parts))


def _captured(workload: Workload, build: object, spec: TensorSpec, precision: Precision) -> Chain:
    """Cut a thin part, or all of them, into layers, without weights."""
    try:
        chain = capture(skeleton(build, seed=workload.config.seed), spec, precision)  # type: ignore[arg-type]
    except CaptureError as error:
        raise ConfigError(f"--method incubate: the meta model of {workload.source.spec} cannot be cut: {error}") from error
    chain.drop_values()
    return chain


def _check_boundaries(workload: Workload, spans: Spans) -> None:
    """Refuse cuts that several tensors cross, or one that thin parts cannot hand on."""
    chain = workload.chain
    for _, stop in spans:
        if len(chain.boundaries[stop]) > 1 or len(chain.boundaries[0]) > 1:
            tensors = ", ".join(map(str, chain.boundaries[stop if len(chain.boundaries[stop]) > 1 else 0]))
            raise ConfigError(
                f"--method incubate needs samples and boundaries of one tensor each, and after layer {chain.layers[stop - 1].name!r} of "
                f"{workload.source.spec} there are {tensors}; give other --cuts, or use --method exact"
            )


class _Builder:
    """Builds a meta model with random values; a copied layer has those that the model's own constructor gives it.

    Args:
        workload: model of the run.
        spans: partitions.
    """

    def __init__(self, workload: Workload, spans: Spans) -> None:
        self._workload, self._spans = workload, spans

    def __call__(self) -> nn.Module:
        seed = self._workload.config.seed
        model = self._workload.build_model(seed) if any(map(self._copies, range(len(self._spans)))) else None
        return nn.Sequential(*(self.part(number, model) for number in range(len(self._spans))))

    def part(self, number: int, model: nn.Module | None) -> nn.Module:
        """Build one thin part.

        Args:
            number: number of the partition.
            model: the model, whose values a copied layer takes; None for a copy without values.
        """
        chain, (start, stop) = self._workload.chain, self._spans[number]
        (before,), (after,) = chain.boundaries[start], chain.boundaries[stop]
        part: nn.Module | None = None
        if self._copies(number):
            part = _copied(chain.layers[start], model)
            if chain.boundaries[start + 1] != (after,):
                behind = self._made(number, start + 1)
                assert behind is not None, "only what can be gone on from is copied"
                part = nn.Sequential(part, behind)
        if (part := part or self._made(number, start)) is None:
            raise ConfigError(
                f"--method incubate has no thin part from {before} to {after}, the boundaries of layers {chain.layers[start].name!r} to "
                f"{chain.layers[stop - 1].name!r}; give other --cuts, or use --method exact"
            )
        # What autocast has thin parts give may be another type than what it has the partition give.
        return part if self._workload.config.precision == "fp32" else nn.Sequential(part, GivenAs(after.dtype))

    def _made(self, number: int, start: int) -> nn.Module | None:
        """Make the cheapest layer from a boundary inside a partition, of one tensor, to its end; None where there is none."""
        chain, stop = self._workload.chain, self._spans[number][1]
        (before,), (after,) = chain.laid_out[start], chain.laid_out[stop]
        with seeded(seed_of(self._workload.config.seed, "thin", number)):
            return make_thin_part(before, after, is_last=stop == len(chain.layers))

    def _copies(self, number: int) -> bool:
        """Decide whether a partition's first layer can stand for all of it, or has to begin it."""
        chain, (start, stop) = self._workload.chain, self._spans[number]
        layer, after = chain.layers[start], chain.boundaries[start + 1]
        is_made = self._made(number, start) is not None
        # A partition of one layer has no thinner one in it.
        if (is_made and stop == start + 1) or not any(one.requires_grad for one in layer.parameters().values()):
            return False
        if after != chain.boundaries[stop] and (is_made or len(after) > 1 or self._made(number, start + 1) is None):
            return False
        # What is in no file of weights, or lies beside it in Python, could not be brought back.
        kept = bool(layer.kept or layer.left or layer.cached or layer.hooks or layer.modes != type(layer.modes)())
        return not kept and set(layer.buffers()) <= set(chain.persistent)


def _copied(layer: Layer, model: nn.Module | None) -> nn.Module:
    """Return a copy of a layer, with a model's values or without any."""
    module = copy.deepcopy(layer.module)
    for name, tensor in _values(layer, model):
        path, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(path), attribute, tensor)
    return CopiedLayer(module)


def _values(layer: Layer, model: nn.Module | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the values of a layer's tensors, parameters as parameters; nothing without a model."""
    if model is None:
        return
    for name, parameter in layer.parameters().items():
        yield name, nn.Parameter(model.get_parameter(name).detach().clone(), parameter.requires_grad)
    for name in layer.buffers():
        yield name, model.get_buffer(name).clone()
