"""Checks of tokens before training: packed documents that see each other, and tokens that a model does not know."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.language import pairs, write_jsonl
from helpers.plainloops import built
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.training.token_checks import are_to_be_checked, check_tokens
from lowmem_pnn.workload import Workload, make_workload
from lowmem_pnn.workload.inputs import python_inputs


class Mixing(nn.Module):
    """A running mean of the tokens of a row, or of each of its documents."""

    def __init__(self, apart: bool, zeros: bool = False) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(256, 8), nn.Linear(8, 256)
        self.apart = apart
        if zeros:
            nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        document = (position_ids == 0).cumsum(1)
        seen = torch.ones(x.shape[1], x.shape[1]).tril()
        if self.apart:
            seen = seen * (document[:, :, None] == document[:, None, :])
        return self.head(seen.float() @ x)


class Anything(Mixing):
    """Takes positions among whatever else it is given, and looks at none."""

    def forward(self, input_ids: Tensor, **others: Any) -> Tensor:
        return self.head(self.tokens(input_ids).cumsum(1))


class Bag(nn.Module):
    """The mean of the embeddings of a text."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(size, 8), nn.Linear(8, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.tokens(input_ids).mean(1))


def workload_of(build: Callable[[], nn.Module], folder: Path, rows: list[Any], **options: Any) -> Workload:
    spec = f"jsonl:{write_jsonl(folder / 'a.jsonl', rows)}"
    config = configure(
        max_gpu_mem="400MB",
        model="python:model",
        data=spec,
        method="exact",
        data_root=folder,
        context=12,
        batch_size=4,
        **options,
    )
    return make_workload(config, *python_inputs(build, spec, None, None)(config), torch.device("cpu"))


def checked(build: Callable[[], nn.Module], folder: Path, rows: list[Any], **options: Any) -> list[str]:
    workload, said = workload_of(build, folder, rows, **options), list[str]()
    assert are_to_be_checked(workload)
    check_tokens(workload, built(build), said.append)
    return said


def test_documents_that_do_not_see_each_other_may_be_packed(tmp_path: Path) -> None:
    assert checked(lambda: Mixing(apart=True), tmp_path, pairs(), pack=True) == []


@pytest.mark.parametrize("build", [lambda: Mixing(apart=False), lambda: Anything(apart=False)])
def test_documents_that_see_each_other_are_refused(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^--pack: model python:model does not keep documents in a row apart by their positions: .*; leave --pack out$",
    ):
        checked(build, tmp_path, pairs(), pack=True)


def test_a_model_that_says_the_same_of_all_tells_nothing(tmp_path: Path) -> None:
    [said] = checked(lambda: Mixing(apart=False, zeros=True), tmp_path, pairs(), pack=True)
    assert "was not found out: before training it says the same of all of them" in said


def test_a_token_that_the_model_does_not_know_is_found_before_training(tmp_path: Path) -> None:
    rows = [{"text": "abc", "label": n % 2} for n in range(20)] + [{"text": "~", "label": 1}]
    assert checked(lambda: Bag(127), tmp_path, rows, target="label") == []
    with pytest.raises(
        ConfigError, match=r"^model python:model does not take token 126 of data a \(IndexError: .*\); give the token"
    ):
        checked(lambda: Bag(126), tmp_path, rows, target="label")
