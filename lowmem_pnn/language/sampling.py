"""Sampling: which token comes next, by the scores that a model gives to all of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_pnn.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: Scores are divided by it; 0 takes the token with the highest score, the first of equal ones.
        top_k: Tokens among which one is drawn: so many with the highest scores; None for all.
        top_p: Share of the probability that the tokens with the highest scores are to have together, of which one is drawn; None for all.

    Raises:
        ConfigError: A value is out of its range, or has no effect.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"--temperature {self.temperature:g} is not 0 or above; give 0 for the likeliest token, or 0.8")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"--top-k {self.top_k} leaves no token; give a number from 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p:g} is not above 0 and at most 1; give, for example, 0.9")
        for name, value in (("--top-k", self.top_k), ("--top-p", self.top_p)):
            if value is not None and not self.temperature:
                raise ConfigError(
                    f"{name} {value:g} has no effect here: temperature 0 takes the likeliest token; give --temperature 1 too"
                )

    def next_token(self, scores: Tensor, seed: int) -> int:
        """Choose a token.

        Args:
            scores: Scores (V,) of all tokens, logits, on the CPU.
            seed: Seed of this choice.

        Raises:
            ConfigError: A score is not a number.

        Example:
            >>> Sampling().next_token(torch.tensor([0.5, 2.0, 1.0]), seed=0)
            1
        """
        if not self.temperature:
            if bool(torch.isnan(scores).any()):
                raise _no_numbers()
            return int(scores.argmax())
        # Below the highest of them, so that a tiny temperature makes others impossible, and none infinite.
        scores = scores.double()
        scores = (scores - scores.max()) / self.temperature
        if self.top_k is not None and self.top_k < len(scores):
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[-1], -math.inf)
        probabilities = torch.softmax(scores, 0)
        if not bool(torch.isfinite(probabilities).all()):
            raise _no_numbers()
        if self.top_p is not None:
            ordered, order = probabilities.sort(descending=True, stable=True)
            # The token that reaches the share is one of them.
            beyond = ordered.cumsum(0) - ordered >= self.top_p
            probabilities = probabilities.index_fill(0, order[beyond], 0.0)
        generator = torch.Generator().manual_seed(seed)
        return int(torch.multinomial(probabilities, 1, generator=generator))


def _no_numbers() -> ConfigError:
    return ConfigError(
        "the model gives scores that are no numbers, so that no token can be chosen; it has not learnt, or diverged"
    )
