"""Peak memory of a range of neighbouring layers that train as one partition. Integers only, no torch.

Letters: layer i of the partition [start, stop), micro-batch m, batch B. W weights and buffers, O optimizer state, S optimizer state that
is streamed in for the step, G gradients.

                 resident                          grows with m
    forward i    W + O + [G if m < B]              input, kept of layers < i, forward peak of i
    objective    W + O + [G if m < B]              input, kept of all layers, objective
    backward i   W + O + [G if m < B, else G > i]  input, kept of layers <= i, gradient of i's output, backward peak of i
    step i       W + O + [G if m < B, else G > i]  input, kept of layers < i, gradients when the last of i's is there; S of i, temporaries
    step         W + O + G                         nothing; S of one layer, the optimizer's temporaries

A weight that several layers of the partition share has one W, O and G; but until all of its layers have gone back, the gradient that the
later ones have made is a G beside it. Where a later partition holds such a weight too, and m < B, its gradient comes in beside the own
one: a G more.

A partition's peak is the greatest of these. Gradients are in memory during the forward only where a batch takes several micro-batches.
Where a batch takes one micro-batch, and the step of a layer comes at the end of its backward (`LayerCost.freed_gradient_bytes`),
its gradients are freed there, G > i is nothing, and there is a step i for each such layer.
"""

from collections.abc import Iterator, Sequence

from lowmem_pnn.profiling.costs import Affine, LayerCost


class RangePeaks:
    """Peak memory of ranges of layers, at one micro-batch.

    Args:
        layers: Costs of the layers.
        micro_batch: Samples on the device at once.
        accumulates: Whether gradients stay in memory from one micro-batch to the next: a batch takes several micro-batches.
    """

    def __init__(self, layers: Sequence[LayerCost], micro_batch: int, accumulates: bool) -> None:
        self.micro_batch = m = micro_batch
        self.accumulates = accumulates
        # Plain tuples: the planner goes through the layers of a range some hundred thousand times.
        self._layers = [
            (
                # Undoing a batch that ran out of memory takes a copy of the buffers.
                layer.weight_bytes + 2 * layer.buffer_bytes + layer.optimizer_bytes,
                layer.gradient_bytes if accumulates else layer.gradient_bytes - layer.freed_gradient_bytes,
                layer.step_bytes + layer.streamed_state_bytes,
                layer.input_bytes.at(m),
                layer.kept.at(m),
                layer.forward_peak.at(m),
                layer.output_bytes.at(m) + self._backward(layer),
                layer.emit_peak.at(m),
                layer.ties,
            )
            for layer in layers
        ]

    def _backward(self, layer: LayerCost) -> int:
        """Return the peak of a layer's backward, as `LayerCost.backward_peak` counts, with its step where that comes at the end of it."""
        peak = layer.backward_peak.at(self.micro_batch)
        if not layer.freed_gradient_bytes:
            return peak
        # The step comes when the kernels' scratch memory is free.
        return max(peak, layer.complete.at(self.micro_batch) + layer.step_bytes + layer.streamed_state_bytes)

    def ranges(self, start: int) -> Iterator[tuple[int, int, int]]:
        """Iterate over the ranges of layers that begin at `start`: of one layer, of two, and so on to the end of the chain.

        Args:
            start: First layer of every range.

        Yields:
            Bytes of the range's peak without its objective, which never fall as the range grows; the bytes in memory when the
            objective begins; and the bytes of gradients that later ranges leave for weights of this one, which come on top of the peak.
        """
        # The weights that the range shares with itself or with others, and the gradients of those that later ranges hold too.
        shared: set[int] = set()
        from_later: dict[int, int] = {}
        resident, gradients, kept, step = self._layers[start][3], 0, 0, 0
        # Highest so far, above the bytes that are in memory all the time.
        forward = backward = 0
        for number, (weights, gradient, temporary, inputs, keeps, forward_peak, backward_peak, emit_peak, ties) in enumerate(
            self._layers[start:], start
        ):
            again = 0
            for tie in ties:
                if tie.number in shared:
                    weights -= tie.weight_bytes + tie.optimizer_bytes
                    again += tie.gradient_bytes
                elif tie.is_first:
                    from_later[tie.number] = tie.gradient_bytes if self.accumulates else 0
                shared.add(tie.number)
                if tie.is_last:
                    from_later.pop(tie.number, None)
            resident += weights
            gradients += gradient - again
            step = max(step, temporary)
            forward = max(forward, kept + forward_peak, (inputs if number > start else 0) + emit_peak)
            kept += keeps
            # Gradients are made from the last layer to the first: those of the new layer are in memory during the backward of all
            # earlier layers.
            earlier = backward + (again if self.accumulates else gradient) if number > start else 0
            backward = max(earlier, kept + backward_peak)
            during = resident + (gradients if self.accumulates else 0)
            peak = max(during + forward, during + backward, resident + gradients + step)
            yield peak, during + kept, sum(from_later.values())

    def with_objective(self, of_range: tuple[int, int, int], objective: Affine) -> int:
        """Return the peak of a range with its objective, in bytes.

        Args:
            of_range: Bytes of the range, from `ranges`.
            objective: Bytes of the loss: `fixed` all the time, `per_sample` between forward and backward.
        """
        peak, held, from_later = of_range
        return objective.fixed + max(peak + from_later, held + objective.per_sample * self.micro_batch)


def peak_of(layers: Sequence[LayerCost], micro_batch: int, batch: int, objective: Affine) -> int:
    """Return the peak of neighbouring layers that train as one partition, in bytes.

    Args:
        layers: Costs of the layers.
        micro_batch: Samples in the largest micro-batch (see `largest_micro_batch`).
        batch: Samples of an optimizer step.
        objective: Bytes of the partition's loss.
    """
    peaks = RangePeaks(layers, micro_batch, micro_batch < batch)
    *_, whole = peaks.ranges(0)
    return peaks.with_objective(whole, objective)


def largest_micro_batch(batch: int, micro_batch: int, smallest: int) -> int:
    """Return the number of samples in the largest micro-batch of a batch.

    A remainder of fewer samples than the modules accept joins the micro-batch before it.

    Args:
        batch: Samples of an optimizer step.
        micro_batch: Samples at once, as asked.
        smallest: Fewest samples that the modules accept.

    Example:
        >>> largest_micro_batch(9, 4, smallest=2), largest_micro_batch(9, 4, smallest=1), largest_micro_batch(9, 64, smallest=1)
        (5, 4, 9)
    """
    if micro_batch >= batch:
        return batch
    remainder = batch % micro_batch
    return micro_batch + remainder if remainder < smallest else micro_batch


def default_objective(layer: LayerCost) -> Affine:
    """Return the assumed bytes of a loss over a layer's outputs: targets, differences and a gradient, each as large as the outputs."""
    return Affine(0, 3 * layer.output_bytes.per_sample)
