"""What layers cost in memory, and what a run of neighbouring layers comes to while it trains. Integers only, no torch.

Letters: layer i of the partition [start, stop), micro-batch m, batch B. W weights and buffers, O optimizer state, G gradients.

                 resident                          grows with m
    forward i    W + O + [G if m < B]              input, kept of layers < i, forward peak of i
    objective    W + O + [G if m < B]              input, kept of all layers, objective
    backward i   W + O + [G if m < B, else G > i]  input, kept of layers <= i, gradient of i's output, backward peak of i
    step         W + O + G                         nothing; the optimizer's temporaries

A partition's peak is the greatest of these. Gradients are there during the forward only where a batch takes several
micro-batches. Where it takes one, and a layer steps as soon as its gradients are whole (`freed_gradient_bytes`), G > i is nothing: the step
of i comes at the end of its backward, and its gradients go with it.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Affine:
    """Bytes as a function of the number of samples.

    Args:
        fixed: bytes for any number.
        per_sample: bytes for each sample.

    Example:
        >>> Affine(100, 4).at(8)
        132
    """

    fixed: int
    per_sample: int

    def at(self, batch: int) -> int:
        """Bytes for `batch` samples."""
        return self.fixed + self.per_sample * batch


@dataclass(frozen=True)
class Envelope:
    """A peak: the greatest of several moments, each of which grows with the number of samples at a pace of its own.

    One straight line is not enough: a linear layer's backward peaks at its weight gradient when samples are few, and at its input
    gradient when they are many.

    Args:
        moments: at least one; those that are never the greatest are better left out (`Envelope.over` does).

    Example:
        >>> peak = Envelope((Affine(100, 1), Affine(0, 5)))
        >>> peak.at(10), peak.at(100)
        (110, 500)
    """

    moments: tuple[Affine, ...]

    def at(self, batch: int) -> int:
        """Bytes for `batch` samples."""
        return max(moment.fixed + moment.per_sample * batch for moment in self.moments)

    @classmethod
    def over(cls, moments: Iterable[Affine]) -> "Envelope":
        """The envelope of many moments, without those that another one bounds from above at every number of samples from 0.

        Args:
            moments: any number; none is an envelope of 0 bytes.
        """
        kept: list[Affine] = []
        # Steepest last: a moment stays only if it starts above all that are steeper.
        for moment in sorted(set(moments), key=lambda moment: (-moment.per_sample, -moment.fixed)):
            if not kept or moment.fixed > kept[-1].fixed:
                kept.append(moment)
        return cls(tuple(kept) or (Affine(0, 0),))


@dataclass(frozen=True)
class LayerCost:
    """One layer's memory in bytes, and its work.

    Args:
        name: the layer's.
        num_params: elements of its parameters.
        weight_bytes: its parameters; a weight that several layers share is counted with the first of them.
        buffer_bytes: its buffers.
        gradient_bytes: gradients of its trainable parameters.
        optimizer_bytes: the optimizer's state for them.
        step_bytes: the most that the optimizer allocates for a moment while it steps them.
        forward_peak: the most that a forward in train mode holds above its start (inputs and weights not counted), outputs
            included.
        kept: what is still held after it: what it saved for backward, and its outputs.
        backward_peak: the most that its backward holds above `kept` and the gradient that comes in, its own parameters' gradients
            and the gradient that goes out included.
        emit_peak: the most that a forward in eval mode without gradients holds above its start, outputs included.
        input_bytes: the boundary tensors before it.
        output_bytes: the boundary tensors after it.
        forward_macs: multiply-accumulates of a forward, per sample.
        freed_gradient_bytes: of the gradients, those that are gone before the layer before it goes back, if a batch is one micro-batch.
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

    @property
    def state_bytes(self) -> int:
        """What training holds of the layer at any batch: weights, buffers, gradients and optimizer state."""
        return self.weight_bytes + self.buffer_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class MemoryProfile:
    """What every layer of a chain costs.

    Args:
        layers: in order.
        forbidden_cuts: layers that must not start a partition, because a weight is shared across the cut.
        optimizer: what the optimizer's state was counted for, in words.
        smallest_micro_batch: the fewest samples that all layers accept in train mode.
        kernel_bytes: code that is compiled for the layers and kept, for the whole chain.
        repeated_bytes: training state of tensors that is counted with several layers, but for the first time.
        shared_bytes: weights that learn and that layers in several partitions may share.
    """

    layers: tuple[LayerCost, ...]
    forbidden_cuts: tuple[int, ...] = ()
    optimizer: str = ""
    smallest_micro_batch: int = 1
    kernel_bytes: int = 0
    repeated_bytes: int = 0
    shared_bytes: int = 0

    @property
    def training_state_bytes(self) -> int:
        """Weights, buffers, gradients and optimizer state of the whole model."""
        return sum(layer.state_bytes for layer in self.layers) - self.repeated_bytes

    def to_json(self) -> str:
        """The profile as JSON text, which `from_json` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> "MemoryProfile":
        """Read what `to_json` wrote.

        Args:
            text: JSON text, or the object in it.
        """
        data = dict(json.loads(text) if isinstance(text, str) else text)
        return cls(
            layers=tuple(
                LayerCost(**{field.name: _cost(layer[field.name]) for field in fields(LayerCost)}) for layer in data["layers"]
            ),
            forbidden_cuts=tuple(data["forbidden_cuts"]),
            optimizer=data["optimizer"],
            smallest_micro_batch=data["smallest_micro_batch"],
            kernel_bytes=data["kernel_bytes"],
            repeated_bytes=data["repeated_bytes"],
            shared_bytes=data["shared_bytes"],
        )


def _cost(value: Any) -> Any:
    """A field of LayerCost out of JSON."""
    if not isinstance(value, dict):
        return value
    return Envelope(tuple(Affine(**moment) for moment in value["moments"])) if "moments" in value else Affine(**value)


def streamed(layer: LayerCost) -> LayerCost:
    """A layer whose optimizer state is not resident with its weights; what one layer's takes while it steps is for the caller to add.

    Args:
        layer: with resident state.
    """
    return replace(layer, optimizer_bytes=0)


def stepped_in_backward(layer: LayerCost) -> LayerCost:
    """A layer whose weights step as soon as their gradients are whole, if a batch is one micro-batch.

    Args:
        layer: whose gradients come from a single backward.
    """
    return replace(layer, freed_gradient_bytes=layer.gradient_bytes)


def with_local_loss(layer: LayerCost) -> LayerCost:
    """A layer that goes back from a loss of its own before the next one runs forward: it keeps nothing but its outputs.

    Args:
        layer: whose forward is up to its loss; its input is what the layer before keeps.
    """

    def moments(cost: Affine | Envelope) -> tuple[Affine, ...]:
        return cost.moments if isinstance(cost, Envelope) else (cost,)

    before, kept = layer.input_bytes.per_sample, layer.kept
    forward = [Affine(moment.fixed, moment.per_sample + before) for moment in moments(layer.forward_peak)]
    backward = [
        Affine(moment.fixed + kept.fixed, moment.per_sample + kept.per_sample + before) for moment in moments(layer.backward_peak)
    ]
    return replace(layer, forward_peak=Envelope.over([*forward, *backward]), kept=Affine(0, 0), backward_peak=Affine(0, 0))


def in_chunks(layer: LayerCost, samples: float) -> LayerCost:
    """A last layer that is computed, with the loss, for a few samples at a time; its weights' gradients add up.

    Args:
        layer: computed as a whole.
        samples: at a time; of tokens, a fraction of a sample.
    """

    def fixed(cost: Affine | Envelope) -> Affine:
        moments = cost.moments if isinstance(cost, Envelope) else (cost,)
        return Affine(max(moment.fixed + math.ceil(moment.per_sample * samples) for moment in moments), 0)

    backward = fixed(layer.backward_peak).fixed + layer.gradient_bytes
    return replace(
        layer,
        forward_peak=fixed(layer.forward_peak),
        kept=Affine(0, 0),
        backward_peak=Affine(backward + fixed(layer.kept).fixed, layer.input_bytes.per_sample),
        emit_peak=fixed(layer.emit_peak),
        output_bytes=fixed(layer.output_bytes),
    )


class Prices:
    """Every layer's bytes at one number of samples, and from them the peaks of runs of layers.

    Args:
        layers: what they cost.
        micro_batch: samples on the device at once.
        accumulates: whether gradients stay from one micro-batch to the next: a batch takes several.
    """

    def __init__(self, layers: Sequence[LayerCost], micro_batch: int, accumulates: bool) -> None:
        self.micro_batch = m = micro_batch
        self.accumulates = accumulates
        # Plain tuples: the planner goes through a run's layers some hundred thousand times.
        self._layers = [
            (
                # Undoing a batch that ran out of memory takes a copy of the buffers.
                layer.weight_bytes + 2 * layer.buffer_bytes + layer.optimizer_bytes,
                layer.gradient_bytes if accumulates else layer.gradient_bytes - layer.freed_gradient_bytes,
                layer.step_bytes,
                layer.input_bytes.at(m),
                layer.kept.at(m),
                layer.forward_peak.at(m),
                # A step in backward finds what the layer's backward has left.
                layer.output_bytes.at(m) + layer.backward_peak.at(m) + (layer.step_bytes if layer.freed_gradient_bytes else 0),
                layer.emit_peak.at(m),
            )
            for layer in layers
        ]

    def runs(self, start: int) -> Iterator[tuple[int, int]]:
        """The runs of layers that begin at `start`: of one layer, of two, and so on to the chain's end.

        Args:
            start: their first layer.

        Yields:
            The run's peak apart from its objective, which never falls as the run grows; and what it holds when the objective
            begins.
        """
        resident, gradients, kept, step = self._layers[start][3], 0, 0, 0
        # Highest so far, above what is there all the time.
        forward = backward = 0
        for number, (weights, gradient, temporary, inputs, keeps, forward_peak, backward_peak, emit_peak) in enumerate(
            self._layers[start:], start
        ):
            resident += weights
            gradients += gradient
            step = max(step, temporary)
            forward = max(forward, kept + forward_peak, (inputs if number > start else 0) + emit_peak)
            kept += keeps
            # Gradients come into being from the last layer to the first: the new layer's are there in all earlier layers'
            # backward.
            backward = max(backward + (0 if self.accumulates else gradient), kept + backward_peak)
            during = resident + (gradients if self.accumulates else 0)
            yield max(during + forward, during + backward, resident + gradients + step), during + kept

    def with_objective(self, run: tuple[int, int], objective: Affine) -> int:
        """The peak of a run that `runs` gave, its objective included.

        Args:
            run: from `runs`.
            objective: what its loss needs: `fixed` all the time, `per_sample` between forward and backward.

        Returns:
            Bytes.
        """
        peak, held = run
        return objective.fixed + max(peak, held + objective.per_sample * self.micro_batch)


def largest_part(batch: int, micro_batch: int, smallest: int) -> int:
    """Samples in the largest micro-batch of a batch: a rest of fewer than the modules accept joins the one before it.

    Args:
        batch: samples a step.
        micro_batch: samples at once, as asked.
        smallest: the fewest samples that the modules accept.

    Example:
        >>> largest_part(9, 4, smallest=2), largest_part(9, 4, smallest=1), largest_part(9, 64, smallest=1)
        (5, 4, 9)
    """
    if micro_batch >= batch:
        return batch
    rest = batch % micro_batch
    return micro_batch + rest if rest < smallest else micro_batch


def default_objective(layer: LayerCost) -> Affine:
    """What a loss over a layer's outputs is taken to need: targets, differences and a gradient, each as large as they."""
    return Affine(0, 3 * layer.output_bytes.per_sample)


def peak_of(layers: Sequence[LayerCost], part: int, batch: int, objective: Affine) -> int:
    """The peak of neighbouring layers as one partition, in bytes.

    Args:
        layers: what they cost.
        part: samples in its largest micro-batch.
        batch: samples a step.
        objective: of the partition.
    """
    prices = Prices(layers, part, part < batch)
    *_, run = prices.runs(0)
    return prices.with_objective(run, objective)
