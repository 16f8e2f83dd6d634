"""Lists of models, data and methods: what they name is what the options take."""

import json

import pytest

from helpers.commands import lowmem_pnn
from lowmem_pnn.cli.lists import DATA, METHOD_TEXTS, MODELS
from lowmem_pnn.config.configure import DOWNLOADED
from lowmem_pnn.config.fit_config import METHODS
from lowmem_pnn.zoo.cifar_models import CIFAR_MODELS


@pytest.mark.parametrize("command", ["models", "data", "methods"])
def test_a_list_has_a_line_for_each(command: str) -> None:
    listed = {"models": MODELS, "data": DATA, "methods": METHOD_TEXTS}[command]
    shown = lowmem_pnn(command)
    assert shown.code == 0
    assert [line.split("  ")[0] for line in shown.out.splitlines()] == list(listed)
    assert max(map(len, shown.out.splitlines())) <= 160
    assert json.loads(lowmem_pnn(f"{command} --json").out) == dict(listed)


def test_the_lists_name_what_there_is() -> None:
    assert tuple(METHOD_TEXTS) == METHODS
    assert set(CIFAR_MODELS) <= set(MODELS)
    named = ", ".join(DATA)
    assert all(name in named for name in ("digits", *DOWNLOADED))


def test_all_models_are_listed_by_name() -> None:
    assert "\nefficientnet_b0 " in lowmem_pnn("models --all").out
