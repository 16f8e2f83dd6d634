"""The next token: the likeliest, or drawn among those that are let, by a seed."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.language.sampling import Sampling

SCORES = torch.tensor([0.0, 3.0, 1.0, 3.0, 2.0])


def test_without_temperature_the_first_of_the_likeliest_is_taken() -> None:
    assert [Sampling().next_token(SCORES, seed) for seed in range(3)] == [1, 1, 1]


def test_tokens_are_drawn_by_their_probabilities() -> None:
    drawn = Counter(Sampling(temperature=2.0).next_token(SCORES, seed) for seed in range(2000))
    expected = torch.softmax(SCORES / 2, 0)
    assert all(abs(drawn[token] / 2000 - float(share)) < 0.04 for token, share in enumerate(expected))


@pytest.mark.parametrize(
    ("options", "let"),
    [
        ({"top_k": 1}, {1, 3}),  # equal ones are all let
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.3}, {1}),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_k": 3, "top_p": 0.95}, {1, 3, 4}),
    ],
)
def test_others_than_the_likeliest_are_left_out(options: dict[str, Any], let: set[int]) -> None:
    sampling = Sampling(temperature=1.5, **options)
    assert {sampling.next_token(SCORES, seed) for seed in range(300)} == let


def test_a_seed_draws_the_same_token() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9)
    assert [sampling.next_token(SCORES, seed) for seed in range(20)] == [sampling.next_token(SCORES, seed) for seed in range(20)]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_a_tiny_temperature_takes_one_of_the_likeliest(options: dict[str, Any]) -> None:
    sampling = Sampling(temperature=1e-310, **options)
    assert {sampling.next_token(SCORES, seed) for seed in range(50)} <= {1, 3}
    assert sampling.next_token(torch.tensor([-2.0, 1.0]), 0) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "--temperature -1 is not 0 or above; give 0 for the likeliest token, or 0.8"),
        ({"temperature": math.nan}, "--temperature nan is not 0 or above; give 0 for the likeliest token, or 0.8"),
        ({"temperature": 1.0, "top_k": 0}, "--top-k 0 leaves no token; give a number from 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p 0 is not above 0 and at most 1; give, for example, 0.9"),
        ({"top_k": 5}, "--top-k 5 has no effect here: temperature 0 takes the likeliest token; give --temperature 1 too"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Sampling(**options)
    assert str(error.value) == message


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_no_numbers_are_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="the model gives scores that are no numbers"):
        Sampling(temperature).next_token(torch.tensor([1.0, math.nan]), 0)
