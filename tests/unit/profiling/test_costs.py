"""Costs: how bytes grow with samples, and what a run of layers comes to."""

import json

from hypothesis import assume, given
from hypothesis import strategies as st

from helpers.strategies import affines, profiles
from lowmem_pnn.profiling.costs import Affine, Envelope, LayerCost, MemoryProfile, Prices, default_objective, largest_part

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


@given(st.lists(affines(), max_size=6), st.integers(0, 300))
def test_an_envelope_is_the_greatest_of_its_moments(moments, batch):
    assert Envelope.over(moments).at(batch) == max([moment.at(batch) for moment in moments], default=0)


def test_an_envelope_drops_what_is_never_the_greatest():
    assert Envelope.over([Affine(5, 1), Affine(5, 2), Affine(9, 0), Affine(9, 0)]).moments == (Affine(5, 2), Affine(9, 0))


def test_an_envelope_follows_moments_that_fall_with_the_batch():
    envelope = Envelope.over([Affine(100, -3), Affine(0, 1)])
    assert (envelope.at(1), envelope.at(50)) == (97, 50)


@given(profiles())
def test_a_profile_survives_json(profile):
    assert MemoryProfile.from_json(profile.to_json()) == profile
    assert MemoryProfile.from_json(json.loads(profile.to_json())) == profile


def test_the_state_is_weights_buffers_gradients_and_optimizer():
    assert LAYER.state_bytes == 40 + 3 + 36 + 72


def test_a_layer_alone_by_hand():
    # weights, twice the buffers, the optimizer's state, and inputs of 2 samples
    resident = 40 + 6 + 72 + 22
    [(peak, held)] = Prices([LAYER], 2, accumulates=False).runs(0)
    assert held == resident + 14
    assert peak == resident + 14 + 8 + max(36 + 2, 18)
    [(peak, held)] = Prices([LAYER], 2, accumulates=True).runs(0)
    assert held == resident + 36 + 14
    assert peak == resident + 36 + 14 + 8 + 38


def test_with_few_samples_the_optimizers_step_can_be_the_peak():
    [(peak, _)] = Prices([LAYER], 0, accumulates=False).runs(0)
    assert peak == 40 + 6 + 72 + 36 + 8


def test_gradients_of_later_layers_are_there_in_an_earlier_backward():
    [_, (peak, _)] = Prices([LAYER, LAYER], 100, accumulates=False).runs(0)
    resident = 2 * (40 + 6 + 72) + 1100
    last, first = 2 * 602 + 400 + 900, 602 + 400 + 900 + 36
    assert peak == resident + max(last, first)
    [_, (peak, _)] = Prices([LAYER, LAYER], 1, accumulates=False).runs(0)
    assert peak == 2 * (40 + 6 + 72) + 11 + max(2 * 8 + 4 + 37, 8 + 4 + 37 + 36, 2 * 36 + 8)


def test_an_objective_is_fixed_all_the_time_and_grows_between_forward_and_backward():
    prices = Prices([LAYER], 2, accumulates=False)
    [run] = prices.runs(0)
    assert prices.with_objective(run, Affine(1000, 0)) == run[0] + 1000
    assert prices.with_objective(run, Affine(0, 1000)) == run[1] + 2000


def test_the_default_objective_is_three_times_the_outputs():
    assert default_objective(LAYER) == Affine(0, 12)


@given(profiles(), st.integers(1, 40), st.booleans())
def test_a_runs_peak_never_falls_as_it_grows(profile, batch, accumulates):
    for start in range(len(profile.layers)):
        peaks = [peak for peak, _ in Prices(profile.layers, batch, accumulates).runs(start)]
        assert len(peaks) == len(profile.layers) - start
        assert peaks == sorted(peaks)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 3))
def test_the_largest_part_is_that_of_the_parts(batch, size, smallest):
    assume(size >= smallest)
    parts = [size] * (batch // size) + ([batch % size] if batch % size else [])
    if len(parts) > 1 and parts[-1] < smallest:
        rest = parts.pop()
        parts[-1] += rest
    assert largest_part(batch, size, smallest) == max(parts)
