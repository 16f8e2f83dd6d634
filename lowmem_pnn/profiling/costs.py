"""Memory costs of layers, and of layers that are run in other ways. Integers only, no torch."""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Affine:
    """Bytes as a function of the number of samples.

    Args:
        fixed: Bytes for any number of samples.
        per_sample: Bytes for each sample.

    Example:
        >>> Affine(100, 4).at(8)
        132
    """

    fixed: int
    per_sample: int

    def at(self, batch: int) -> int:
        """Return the bytes for `batch` samples."""
        return self.fixed + self.per_sample * batch


@dataclass(frozen=True)
class Envelope:
    """Peak memory: the greatest of several moments, each of which grows with the number of samples at its own pace.

    One straight line is not enough: a linear layer's backward peaks at its weight gradient when samples are few, and at its input
    gradient when samples are many.

    Args:
        moments: Bytes at each moment, at least one; moments that are never the greatest are better left out, as `Envelope.over` does.

    Example:
        >>> peak = Envelope((Affine(100, 1), Affine(0, 5)))
        >>> peak.at(10), peak.at(100)
        (110, 500)
    """

    moments: tuple[Affine, ...]

    def at(self, batch: int) -> int:
        """Return the bytes for `batch` samples."""
        return max(moment.fixed + moment.per_sample * batch for moment in self.moments)

    @classmethod
    def over(cls, moments: Iterable[Affine]) -> "Envelope":
        """Make the envelope of many moments, without those that another one bounds from above at every number of samples.

        Args:
            moments: Bytes at each moment; without any the envelope is 0 bytes.
        """
        kept: list[Affine] = []
        # From the steepest down: a moment stays only if it starts above all that are steeper.
        for moment in sorted(set(moments), key=lambda moment: (-moment.per_sample, -moment.fixed)):
            if not kept or moment.fixed > kept[-1].fixed:
                kept.append(moment)
        return cls(tuple(kept) or (Affine(0, 0),))


@dataclass(frozen=True)
class Product:
    """A matrix product, convolution or attention of a layer's forward: what is dear to compute for the size of its outputs.

    Args:
        macs: Multiply-accumulates that its outputs take; of a layer, per sample.
        nbytes: Bytes of its outputs; of a layer, per sample.
    """

    macs: int
    nbytes: int


@dataclass(frozen=True)
class Tie:
    """A parameter of a layer that other layers hold too.

    Args:
        number: Number of the parameter, the same in all layers that hold it.
        is_first: Whether no layer before holds it.
        is_last: Whether no layer after holds it.
        num_params: Number of its elements.
        weight_bytes: Bytes of the parameter.
        gradient_bytes: Bytes of its gradient.
        optimizer_bytes: Bytes of its optimizer state.
    """

    number: int
    is_first: bool
    is_last: bool
    num_params: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True)
class LayerCost:
    """Memory of one layer in bytes, and its multiply-accumulates.

    Args:
        name: Name of the layer.
        num_params: Number of elements in the layer's parameters.
        weight_bytes: Bytes of the parameters; a weight that several layers share is counted with each of them.
        buffer_bytes: Bytes of the buffers.
        gradient_bytes: Bytes of the trainable parameters' gradients.
        optimizer_bytes: Bytes of the trainable parameters' optimizer state.
        step_bytes: Highest temporary memory of the optimizer's step.
        forward_peak: Highest memory of a forward in train mode, above its start (inputs and weights not counted), outputs included.
        kept: Memory that a forward in train mode leaves: tensors saved for backward, and outputs.
        backward_peak: Highest memory of a backward, above `kept` and the incoming gradient; the gradients of the layer's parameters and
            inputs included.
        emit_peak: Highest memory of a forward in eval mode without gradients, above its start, outputs included.
        input_bytes: Bytes of the boundary tensors before the layer.
        output_bytes: Bytes of the boundary tensors after the layer.
        forward_macs: Multiply-accumulates of a forward, per sample.
        freed_gradient_bytes: Gradient bytes freed by the in-backward step before the previous layer's backward runs, where a batch is one
            micro-batch.
        complete: Memory of a backward at the moment when the last gradient of the layer's parameters is there, as `backward_peak`; no
            kernel's scratch memory is in use then. A step in backward comes on top of it.
        streamed_state_bytes: Bytes of optimizer state that are in memory only during the layer's step.
        whole: Why a large module in the layer is whole, and how large it is, in words; empty for most.
        ties: Parameters that other layers hold too; among the bytes above.
        products: Products of a forward in train mode.
    """

    name: str
    num_params: int
    weight_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    step_bytes: int
    forward_peak: Affine | Envelope
    kept: Affine
    backward_peak: Affine | Envelope
    emit_peak: Affine | Envelope
    input_bytes: Affine
    output_bytes: Affine
    forward_macs: int
    freed_gradient_bytes: int = 0
    complete: Affine | Envelope = Affine(0, 0)
    streamed_state_bytes: int = 0
    whole: str = ""
    ties: tuple[Tie, ...] = ()
    products: tuple[Product, ...] = ()

    @property
    def state_bytes(self) -> int:
        """Bytes of the layer in training, whatever the batch: weights, buffers, gradients and optimizer state."""
        return self.weight_bytes + self.buffer_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class MemoryProfile:
    """Memory costs of every layer of a chain.

    Args:
        layers: Costs of the layers, in order.
        forbidden_cuts: Numbers of the layers that must not start a partition, because a weight is shared across the cut.
        optimizer: Names of the optimizers whose state was counted.
        smallest_micro_batch: Fewest samples that all layers accept in train mode.
        kernel_bytes: Bytes of kernels that are compiled for the layers and kept, for the whole chain, in training by micro-batches of one
            size.
        emit_kernel_bytes: Bytes of kernels that forwards of another size compile beside them.
        untouched_bytes: Most bytes that a kernel takes from the system without using them.
        widest_product: Largest width of a matrix product (`kernel_memory.product_width`).
        shared_bytes: Bytes of the trainable weights that layers in several partitions may share.
    """

    layers: tuple[LayerCost, ...]
    forbidden_cuts: tuple[int, ...] = ()
    optimizer: str = ""
    smallest_micro_batch: int = 1
    kernel_bytes: int = 0
    emit_kernel_bytes: int = 0
    untouched_bytes: int = 0
    widest_product: int = 0
    shared_bytes: int = 0

    @property
    def training_state_bytes(self) -> int:
        """Bytes of the whole model in training: weights, buffers, gradients and optimizer state."""
        return sum(layer.state_bytes for layer in ties_counted_once(self.layers))

    def to_json(self) -> str:
        """Return the profile as JSON text, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> "MemoryProfile":
        """Read a profile that `to_json` wrote.

        Args:
            text: JSON text, or the object that it holds.
        """
        data = dict(json.loads(text) if isinstance(text, str) else text)
        return cls(
            layers=tuple(
                LayerCost(**{field.name: _field_value(layer[field.name]) for field in fields(LayerCost) if field.name in layer})
                for layer in data["layers"]
            ),
            forbidden_cuts=tuple(data["forbidden_cuts"]),
            optimizer=data["optimizer"],
            smallest_micro_batch=data["smallest_micro_batch"],
            kernel_bytes=data["kernel_bytes"],
            emit_kernel_bytes=data["emit_kernel_bytes"],
            untouched_bytes=data["untouched_bytes"],
            widest_product=data["widest_product"],
            shared_bytes=data["shared_bytes"],
        )


def _field_value(value: Any) -> Any:
    """Return a field of LayerCost from its JSON value."""
    if isinstance(value, list):
        return tuple(Product(**one) if "macs" in one else Tie(**one) for one in value)
    if not isinstance(value, dict):
        return value
    return Envelope(tuple(Affine(**moment) for moment in value["moments"])) if "moments" in value else Affine(**value)


def ties_counted_once(layers: Iterable[LayerCost]) -> tuple[LayerCost, ...]:
    """Return the costs of layers in which the training state of a weight that several of them share is counted with the first of these.

    Sums over them are what the layers have together; peaks are not made of them, since each layer makes a gradient of its own.
    """
    counted: set[int] = set()
    once = []
    for layer in layers:
        again = [tie for tie in layer.ties if tie.number in counted]
        counted |= {tie.number for tie in layer.ties}
        once.append(
            replace(
                layer,
                num_params=layer.num_params - sum(tie.num_params for tie in again),
                weight_bytes=layer.weight_bytes - sum(tie.weight_bytes for tie in again),
                gradient_bytes=layer.gradient_bytes - sum(tie.gradient_bytes for tie in again),
                optimizer_bytes=layer.optimizer_bytes - sum(tie.optimizer_bytes for tie in again),
            )
        )
    return tuple(once)


def with_streamed_state(layer: LayerCost, slice_bytes: int, step_bytes: int) -> LayerCost:
    """Return the cost of a layer whose optimizer state is not resident with its weights but streamed in, slice by slice, for the step.

    Args:
        layer: Cost of a layer whose state is resident.
        slice_bytes: Most bytes of state in memory at one time.
        step_bytes: Highest temporary memory of the step of a slice.
    """
    ties = tuple(replace(tie, optimizer_bytes=0) for tie in layer.ties)
    return replace(layer, optimizer_bytes=0, streamed_state_bytes=slice_bytes, step_bytes=step_bytes, ties=ties)


def without_step(layer: LayerCost) -> LayerCost:
    """Return the cost of a layer that goes forward and back, and whose gradients are then dropped instead of a step."""
    return replace(layer, streamed_state_bytes=0, step_bytes=0)


def with_step_in_backward(layer: LayerCost) -> LayerCost:
    """Return the cost of a layer that steps within the backward, as soon as its gradients are complete.

    Args:
        layer: Cost of a layer whose gradients are complete after one backward.
    """
    return replace(layer, freed_gradient_bytes=layer.gradient_bytes)


def with_local_loss(layer: LayerCost) -> LayerCost:
    """Return the cost of a layer that runs backward from its own loss before the next layer runs forward.

    Such a layer keeps nothing but its outputs.

    Args:
        layer: Cost of a layer whose forward goes up to its loss; its input is the output that the layer before keeps.
    """
    before, kept = layer.input_bytes.per_sample, layer.kept
    forward = [Affine(moment.fixed, moment.per_sample + before) for moment in _moments(layer.forward_peak)]

    def after_forward(peak: Affine | Envelope) -> list[Affine]:
        return [Affine(moment.fixed + kept.fixed, moment.per_sample + kept.per_sample + before) for moment in _moments(peak)]

    return replace(
        layer,
        forward_peak=Envelope.over([*forward, *after_forward(layer.backward_peak)]),
        kept=Affine(0, 0),
        backward_peak=Affine(0, 0),
        complete=Envelope.over(after_forward(layer.complete)),
    )


def with_chunked_loss(layer: LayerCost, samples: float, tiled_bytes: int = 0) -> LayerCost:
    """Return the cost of a last layer that is computed with the loss in chunks; the gradients of its weights add up.

    Args:
        layer: Cost of the layer computed as a whole.
        samples: Samples in a chunk; of tokens, a fraction of a sample.
        tiled_bytes: Bytes that a chunk's own gradients take less, since they are added up in tiles.
    """

    def of_chunk(peak: Affine | Envelope) -> Affine:
        return Affine(max(moment.fixed + math.ceil(moment.per_sample * samples) for moment in _moments(peak)), 0)

    own = (Affine(max(0, moment.fixed - tiled_bytes), moment.per_sample) for moment in _moments(layer.backward_peak))
    backward = of_chunk(Envelope(tuple(own))).fixed + layer.gradient_bytes
    return replace(
        layer,
        forward_peak=of_chunk(layer.forward_peak),
        kept=Affine(0, 0),
        backward_peak=Affine(backward + of_chunk(layer.kept).fixed, layer.input_bytes.per_sample),
        complete=Affine(0, 0),
        emit_peak=of_chunk(layer.emit_peak),
        output_bytes=of_chunk(layer.output_bytes),
    )


def with_vocabulary_tiles(layer: LayerCost, weight_bytes: int, work_bytes: int, slice_bytes: int) -> LayerCost:
    """Return the cost of a last layer whose scores and gradient are made some classes at a time, for all rows of a batch.

    Args:
        layer: Cost of the layer computed in another way.
        weight_bytes: Bytes of its weight.
        work_bytes: Bytes of a batch's inputs and their gradient, and of what is computed of a tile.
        slice_bytes: Most bytes of the gradient that a step takes at one time.
    """
    return replace(
        layer,
        gradient_bytes=layer.gradient_bytes - weight_bytes,
        freed_gradient_bytes=0,
        step_bytes=layer.step_bytes + 2 * slice_bytes,
        forward_peak=Affine(0, 0),
        kept=Affine(0, 0),
        backward_peak=Affine(work_bytes, 0),
        complete=Affine(0, 0),
        output_bytes=Affine(0, 0),
        ties=_without_gradients(layer.ties, {weight_bytes}),
    )


def with_row_gradients(layer: LayerCost, weights: Sequence[int], rows: Affine, batch: int, slice_bytes: int) -> LayerCost:
    """Return the cost of a layer that keeps the gradients of embeddings as rows, and steps after backward.

    Args:
        layer: Cost of the layer with gradients as large as its weights.
        weights: Bytes of these weights.
        rows: Most bytes of their rows, of so many samples.
        batch: Samples of an optimizer step.
        slice_bytes: Most bytes of a gradient that a step takes at one time.
    """
    dense = sum(weights)

    def in_rows(peak: Affine | Envelope) -> Envelope:
        # The rows so far, and those with the rows of a micro-batch; and these, in the order of the tokens and of their numbers.
        own = rows.at(batch)
        return Envelope(
            tuple(
                Affine(max(0, moment.fixed - dense) + own, moment.per_sample + 2 * rows.per_sample) for moment in _moments(peak)
            )
        )

    return replace(
        layer,
        gradient_bytes=layer.gradient_bytes - dense + rows.at(batch),
        freed_gradient_bytes=0,
        step_bytes=layer.step_bytes + 3 * slice_bytes,
        backward_peak=in_rows(layer.backward_peak),
        complete=in_rows(layer.complete),
        ties=_without_gradients(layer.ties, weights),
    )


def _without_gradients(ties: Iterable[Tie], sizes: Collection[int]) -> tuple[Tie, ...]:
    return tuple(replace(tie, gradient_bytes=0) if tie.weight_bytes in sizes else tie for tie in ties)


def _moments(peak: Affine | Envelope) -> tuple[Affine, ...]:
    return peak.moments if isinstance(peak, Envelope) else (peak,)
