"""Peak memory of ranges of layers, by hand and by its rules."""

import itertools
from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from helpers.strategies import profiles
from lowmem_pnn.profiling.costs import Affine, Envelope, LayerCost, Tie, ties_counted_once
from lowmem_pnn.profiling.peaks import RangePeaks, default_objective, largest_micro_batch

LAYER = LayerCost(
    name="fc",
    num_params=10,
    weight_bytes=40,
    buffer_bytes=3,
    gradient_bytes=36,
    optimizer_bytes=72,
    step_bytes=8,
    forward_peak=Affine(5, 7),
    kept=Affine(2, 6),
    backward_peak=Envelope((Affine(36, 1), Affine(0, 9))),
    emit_peak=Affine(0, 4),
    input_bytes=Affine(0, 11),
    output_bytes=Affine(0, 4),
    forward_macs=10,
)


def test_a_layer_alone_by_hand():
    # weights, twice the buffers, the optimizer's state, and inputs of 2 samples
    resident = 40 + 6 + 72 + 22
    [(peak, held, _)] = RangePeaks([LAYER], 2, accumulates=False).ranges(0)
    assert held == resident + 14
    assert peak == resident + 14 + 8 + max(36 + 2, 18)
    [(peak, held, _)] = RangePeaks([LAYER], 2, accumulates=True).ranges(0)
    assert held == resident + 36 + 14
    assert peak == resident + 36 + 14 + 8 + 38


def test_with_few_samples_the_optimizers_step_can_be_the_peak():
    [(peak, _, _)] = RangePeaks([LAYER], 0, accumulates=False).ranges(0)
    assert peak == 40 + 6 + 72 + 36 + 8


def test_gradients_of_later_layers_are_in_memory_in_an_earlier_backward():
    [_, (peak, _, _)] = RangePeaks([LAYER, LAYER], 100, accumulates=False).ranges(0)
    resident = 2 * (40 + 6 + 72) + 1100
    last, first = 2 * 602 + 400 + 900, 602 + 400 + 900 + 36
    assert peak == resident + max(last, first)
    [_, (peak, _, _)] = RangePeaks([LAYER, LAYER], 1, accumulates=False).ranges(0)
    assert peak == 2 * (40 + 6 + 72) + 11 + max(2 * 8 + 4 + 37, 8 + 4 + 37 + 36, 2 * 36 + 8)


def test_a_step_in_backward_comes_when_the_kernels_scratch_is_free():
    def peak(streamed: int, scratch: int) -> int:
        layer = replace(
            LAYER,
            optimizer_bytes=0,
            freed_gradient_bytes=36,
            complete=Affine(36, 2),
            streamed_state_bytes=streamed,
            backward_peak=Affine(36 + scratch, 2),
        )
        [(highest, _, _)] = RangePeaks([layer], 5, accumulates=False).ranges(0)
        return highest

    held = (
        40 + 6 + 55 + 32 + 20 + 36 + 10
    )  # weights, buffers, inputs, kept, the gradients that come in, its own, and those that go out
    assert peak(streamed=72, scratch=0) == peak(streamed=72, scratch=80) == held + 72 + 8
    assert peak(streamed=72, scratch=81) == peak(streamed=0, scratch=81) == held + 81


def test_state_that_is_streamed_comes_beside_gradients_that_wait_for_the_step():
    layer = replace(LAYER, optimizer_bytes=0, streamed_state_bytes=900)
    [_, (peak, _, _)] = RangePeaks([layer, layer], 1, accumulates=True).ranges(0)
    assert peak == 2 * (40 + 6 + 36) + 11 + 900 + 8


def test_an_objective_is_fixed_all_the_time_and_grows_between_forward_and_backward():
    peaks = RangePeaks([LAYER], 2, accumulates=False)
    [(peak, held, _)] = peaks.ranges(0)
    assert peaks.with_objective((peak, held, 0), Affine(1000, 0)) == peak + 1000
    assert peaks.with_objective((peak, held, 0), Affine(0, 1000)) == held + 2000
    assert peaks.with_objective((peak, held, 5), Affine(0, 0)) == peak + 5  # when gradients are there, not at the objective
    assert peaks.with_objective((peak, held, 5), Affine(0, 1000)) == held + 2000


def test_a_weight_that_layers_of_a_range_share_is_there_once_and_its_gradient_twice_in_backward():
    first = replace(LAYER, ties=(Tie(7, True, False, 10, 40, 36, 72),))
    middle, last = LAYER, replace(LAYER, ties=(Tie(7, False, True, 10, 40, 36, 72),))
    alone, _, both = RangePeaks([first, middle, last], 1, accumulates=False).ranges(0)
    assert (alone[2], both[2]) == (0, 0)
    *_, (apart, _, _) = RangePeaks([LAYER, LAYER, LAYER], 1, accumulates=False).ranges(0)
    assert apart - both[0] == 40 + 72  # the gradients of all layers are there in the first one's backward
    alone, _, both = RangePeaks([first, middle, last], 1, accumulates=True).ranges(0)
    assert (alone[2], both[2]) == (36, 0)  # what a later range leaves of each micro-batch comes on top
    *_, (apart, _, _) = RangePeaks([LAYER, LAYER, LAYER], 1, accumulates=True).ranges(0)
    # Gradients of earlier micro-batches stay in memory, one for the weight; that of the present one is on its way to the first layer.
    in_backward = {"apart": 3 * 8 + 4 + 37, "tied": 2 * 8 + 4 + 37 + 36}
    assert apart - both[0] == 40 + 72 + 36 + in_backward["apart"] - in_backward["tied"]
    [_, (alone, _, from_later)] = RangePeaks([middle, last], 1, accumulates=False).ranges(0)
    assert (alone, from_later) == (next(itertools.islice(RangePeaks([LAYER, LAYER], 1, accumulates=False).ranges(0), 1, 2))[0], 0)


def test_sums_count_a_shared_weight_with_the_first_layer_that_holds_it():
    tie = Tie(7, True, False, 10, 40, 36, 72)
    once = ties_counted_once(
        [replace(LAYER, ties=(tie,)), LAYER, replace(LAYER, ties=(replace(tie, is_first=False, is_last=True),))]
    )
    assert [layer.num_params for layer in once] == [10, 10, 0]
    assert [layer.state_bytes for layer in once] == [151, 151, 3]


def test_the_default_objective_is_three_times_the_outputs():
    assert default_objective(LAYER) == Affine(0, 12)


@given(profiles(), st.integers(1, 40), st.booleans())
def test_a_ranges_peak_never_falls_as_it_grows(profile, batch, accumulates):
    for start in range(len(profile.layers)):
        peaks = [peak for peak, _, _ in RangePeaks(profile.layers, batch, accumulates).ranges(start)]
        assert len(peaks) == len(profile.layers) - start
        assert peaks == sorted(peaks)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 3))
def test_the_largest_micro_batch_takes_a_small_remainder(batch, size, smallest):
    assume(size >= smallest)
    sizes = [size] * (batch // size) + ([batch % size] if batch % size else [])
    if len(sizes) > 1 and sizes[-1] < smallest:
        remainder = sizes.pop()
        sizes[-1] += remainder
    assert largest_micro_batch(batch, size, smallest) == max(sizes)
