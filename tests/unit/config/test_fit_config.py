"""`FitConfig`: to JSON and back, and what its fields say."""

import json

import numpy as np
import pytest

from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig, field_names
from lowmem_pnn.errors import CheckpointError


def make(**options: object) -> FitConfig:
    return configure(**{"max_gpu_mem": "1GB", "model": "mlp:64-10", "data": "digits", **options})


def test_json_gives_the_same_configuration() -> None:
    config = make(
        cuts="1",
        epochs="1,2",
        max_disk="3GB",
        model="resnet18",
        model_arg={"a": [1, "b", None], "b": (1, [(2, 3)]), "c": {1: {2}}, "d": None, "e": 1e-9},
        lr=1e-5,
        optimizer="sgd,adam",
        shuffle="no",
        sil="sparse",
        parallel_sil=True,
    )
    assert FitConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ["", "{}", "[1]", "not json"])
def test_json_that_is_no_configuration_is_a_damaged_run(text: str) -> None:
    with pytest.raises(CheckpointError, match="resume with the version that wrote it"):
        FitConfig.from_json(text)


def test_json_of_another_version_names_what_it_does_not_know() -> None:
    values = {**json.loads(make().to_json()), "momentums": 1}
    with pytest.raises(CheckpointError, match=r"there is no option --momentums; did you mean 'momentum'\?"):
        FitConfig.from_json(json.dumps(values))


def test_every_field_says_what_it_is() -> None:
    for name in field_names():
        description = FitConfig.__dataclass_fields__[name].default.description
        assert description.endswith("."), name


@pytest.mark.parametrize(
    "value", [None, True, -1, 2**200, 1e308, "", "x", "\0", "../../x", [], [None], [[]], {}, {"a": []}], ids=repr
)
def test_any_value_in_a_configuration_is_taken_or_refused_in_one_line(value: object) -> None:
    whole = json.loads(make().to_json())
    refused: list[str] = []
    for name in field_names():
        try:
            FitConfig.from_json(json.dumps({**whole, name: value}))
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > len(whole) // 4
    assert not [text for text in refused if "\n" in text]


def test_class_weights_may_be_an_array() -> None:
    for weights in (np.array([0.5, 2.0]), [0.5, 2], "0.5,2"):
        found = make(class_weights=weights)
        assert found.class_weights == (0.5, 2.0)
