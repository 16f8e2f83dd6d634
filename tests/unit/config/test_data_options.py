"""Options about data: what each takes, and what it says to what it does not."""

from pathlib import Path
from typing import Any

import pytest

from lowmem_pnn.config.code import names_code
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.resume import check_trust
from lowmem_pnn.errors import ConfigError


def make(**options: Any) -> Any:
    return configure(**{"max_gpu_mem": "1GB", "model": "resnet18", "data": "cifar10", **options})


@pytest.mark.parametrize(
    ("given", "text", "shape"),
    [
        ("224", "224", (224, 224)),
        (32, "32", (32, 32)),
        ("240x320", "240x320", (240, 320)),
        ((8, 8), "8", (8, 8)),
        ("6X7", "6x7", (6, 7)),
    ],
)
def test_an_image_size_is_a_side_or_two(given: Any, text: str, shape: tuple[int, int]) -> None:
    config = make(image_size=given)
    assert (config.image_size, config.image_shape) == (text, shape)


@pytest.mark.parametrize(
    ("given", "text"),
    [("auto", "auto"), ("0.5/0.25", "0.5/0.25"), ((0.5, 0.25), "0.5/0.25"), (((0.5, 0.4), (0.2, 0.1)), "0.5,0.4/0.2,0.1")],
)
def test_a_normalisation_is_a_word_or_numbers(given: Any, text: str) -> None:
    assert make(normalize=given).normalize == text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"image_size": "0"}, "--image-size '0': sides are from 1 to 16384 pixels"),
        ({"image_size": "10x99999"}, "--image-size '10x99999': sides are from 1 to 16384 pixels"),
        ({"image_size": "big"}, "--image-size 'big': no size in pixels; write N, such as 224, or HxW, such as 240x320"),
        ({"resize": "pad"}, "--resize has no effect here: it needs --image-size"),
        ({"image_size": 8, "resize": "stretch"}, "--resize 'stretch' is none of crop, squash, pad"),
        (
            {"normalize": "imagnet"},
            "--normalize 'imagnet': none of none, auto, imagenet, MEAN/STD; write, for example, 0.5/0.25, or a value",
        ),
        ({"normalize": "0.5/0"}, "--normalize '0.5/0': means are finite, and deviations positive"),
        ({"normalize": "1,2/3"}, "--normalize '1,2/3': has 2 means and 1 deviations; give as many of both"),
        ({"normalize": "nan/1"}, "--normalize 'nan/1': means are finite, and deviations positive"),
        (
            {"augment": "triviall"},
            "--augment 'triviall' is none of none, basic, randaugment, trivial; did you mean 'trivial'?",
        ),
        ({"test_fraction": 1}, "--test-fraction 1: must be less than 1"),
        ({"workers": -1}, "--workers -1: must be greater than or equal to 0"),
        ({"workers": "two"}, "--workers 'two': must be a valid integer"),
        ({"data": "digits", "data_root": "sets"}, "--data-root has no effect here: it needs a data set that is downloaded"),
    ],
)
def test_what_means_nothing_is_said_in_a_line(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**options)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_paths_of_other_sources_are_kept_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make(val_data="imagefolder:a", test_data="own.py:load")
    assert (config.val_data, config.test_data) == (f"imagefolder:{tmp_path}/a", f"{tmp_path}/own.py:load")
    assert make(data="digits", val_data="mnist", data_root="sets").data_root == tmp_path / "sets"


def test_code_of_other_sources_has_to_be_trusted() -> None:
    config = make(val_data="/a/own.py:load")
    assert names_code("val_data", config.val_data)
    assert not names_code("test_data", config.test_data)
    with pytest.raises(
        ConfigError, match=r"would run code from /a/own.py:load; give --val-data /a/own.py:load again, or --trust"
    ):
        check_trust(config, {}, Path("run"), trust=False)
