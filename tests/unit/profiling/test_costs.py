"""Costs: how bytes grow with the number of samples; JSON of a profile."""

import json

from hypothesis import given
from hypothesis import strategies as st

from helpers.strategies import affines, profiles
from lowmem_pnn.profiling.costs import Affine, Envelope, LayerCost, MemoryProfile

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
