"""Seeds of a run, and the random state of whoever called us, on GPUs too: their generators are played here."""

import pytest
import torch
from torch import Tensor

from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.seeds import seeded
from lowmem_pnn.training import start


class Gpus:
    """The generators of two GPUs, each of which holds its seed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, initialized: bool) -> None:
        self.seeds = [5, 6]
        self.asked = False
        for name, call in {
            "is_initialized": lambda: initialized,
            "device_count": lambda: 2,
            "get_rng_state": self.get,
            "set_rng_state": self.set,
            "manual_seed_all": self.seed_all,
        }.items():
            monkeypatch.setattr(torch.cuda, name, call)

    def get(self, index: int) -> Tensor:
        self.asked = True
        return torch.tensor([self.seeds[index]])

    def set(self, state: Tensor, index: int) -> None:
        self.seeds[index] = int(state)

    def seed_all(self, seed: int) -> None:
        self.seeds = [seed, seed]


def test_what_is_seeded_leaves_the_generators_of_gpus_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, initialized=True)
    with seeded(3):
        assert gpus.seeds == [3, 3]
    assert gpus.seeds == [5, 6]
    with start._environment(Display()):
        torch.manual_seed(4)
        assert gpus.seeds == [4, 4]
    assert gpus.seeds == [5, 6]


def test_gpus_that_nobody_has_used_get_the_seed_that_was_given_before(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, initialized=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        torch.rand(2)
        with start._environment(Display()):
            torch.manual_seed(4)
        assert gpus.seeds == [8, 8]
        assert not gpus.asked, "that would make contexts on them"
