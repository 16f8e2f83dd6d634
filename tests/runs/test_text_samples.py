"""What a language model says before training and after it: shown, kept through a resume, and nothing that training depends on."""

from pathlib import Path
from typing import Any

import pytest

import lowmem_pnn
from helpers.displays import StopsAt, Told
from helpers.exact_runs import fit
from helpers.plainloops import assert_same_weights
from helpers.small_networks import small_gpt, small_mlp, tokens, vectors
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, Stopped
from lowmem_pnn.settings.command import fit_command

MODEL = "gpt:layers=2,width=16,heads=2,context=16"
OPTIONS: dict[str, Any] = {"epochs": 12, "batch_size": 16, "lr": 0.01, "cuts": "2", "sample": ["abc", "a"], "sample_tokens": 4}


def text(folder: Path) -> str:
    (folder / "text").write_text("abcdefgh" * 100)
    return f"text:{folder / 'text'}"


def test_a_model_is_asked_before_training_and_after_it(tmp_path: Path) -> None:
    data, said = text(tmp_path), Told()
    result = lowmem_pnn.fit(
        MODEL, data, method="exact", max_gpu_mem="100MB", device="cpu", workdir=tmp_path / "run", display=said, **OPTIONS
    )
    first, second = result.samples
    assert (first["prompt"], first["after"], second["after"]) == ("abc", "defg", "bcde")
    assert first["before"] != first["after"]
    assert lowmem_pnn.generate(result, "abc", max_new_tokens=4) == "defg"
    assert f"before training, after 'abc': {first['before']!r}" in said.messages
    assert "after training, after 'abc': 'defg'" in said.messages
    assert f"after 'a' the model said {second['before']!r}, and says 'bcde'" in str(result)
    options = {name: value for name, value in OPTIONS.items() if not name.startswith("sample")}
    unasked = lowmem_pnn.fit(
        MODEL, data, method="exact", max_gpu_mem="100MB", device="cpu", workdir=tmp_path / "other", **options
    )
    assert unasked.samples == []
    assert_same_weights(lowmem_pnn.load(result), lowmem_pnn.load(unasked))


def test_what_was_said_before_training_outlives_a_stop(tmp_path: Path) -> None:
    data, folder = text(tmp_path), tmp_path / "run"
    options = {"method": "exact", "max_gpu_mem": "100MB", "device": "cpu", **OPTIONS, "epochs": 3, "commit_every": 0}
    whole = lowmem_pnn.fit(MODEL, data, workdir=tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        lowmem_pnn.fit(MODEL, data, workdir=folder, display=StopsAt(14), **options)
    assert lowmem_pnn.fit(MODEL, data, workdir=folder, resume=True, **options).samples == whole.samples


def test_prompts_are_typed_once_each() -> None:
    config = configure(max_gpu_mem="1GB", model="gpt:layers=1", data="text:a", method="exact", sample=("a, b", "it's"))
    assert fit_command(config).endswith("--sample 'a, b' --sample 'it'\"'\"'s'")


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (small_gpt, tokens(), {"sample": "a"}, r"^--sample has no effect here: it needs data of text"),
        (small_mlp, vectors(), {"sample_tokens": 3}, r"^--sample-tokens has no effect here: it needs --sample"),
    ],
)
def test_what_cannot_be_asked_is_refused(model: Any, data: Any, options: Any, message: str, tmp_path: Path) -> None:
    build = (lambda: model(tied=True)) if model is small_gpt else model
    with pytest.raises(ConfigError, match=message):
        fit(build, data, tmp_path / "run", epochs=1, **options)


def test_an_empty_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a text to go on with is empty, or no text"):
        configure(max_gpu_mem="1GB", model="gpt:layers=1", data="text:a", sample=("",))
