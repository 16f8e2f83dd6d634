"""Configuration files: what is read, refused, and written so that it makes the same configuration again."""

from pathlib import Path
from typing import Any

import pytest

from helpers.commands import lowmem_pnn
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.settings.command import fit_command
from lowmem_pnn.settings.config_file import read_config_file, read_settings, to_toml
from lowmem_pnn.stores.disk import write_durably

BASE = {"max_gpu_mem": "1GB", "model": "mlp:64-10", "data": "digits"}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"epochs": "5,160", "lr": "1e-3,1e-4", "shuffle": "yes,no", "cuts": "1", "kappa": "3"},
        {"method": "exact", "compare": False, "clip_norm": 1, "lr_schedule": "cosine", "warmup_steps": 3},
        {"model": "resnet18", "model_arg": {"num_classes": 10, "width_per_group": 64, "norm_layer": None}},
        {"model": "it.py:build", "model_arg": {"a": [None, "None"], "b": {"c": None}, "d": "None", "e": ("None", 1)}},
        {"data": "csv:a.csv", "target": ["a,b", 'the "c"', "d"]},
        {"model": "resnet18", "data": "cifar10", "data_root": "there", "weights": "default", "epochs": 10, "freeze": "layer1.*"},
        {"weights": "default", "lr_for": ["features.*=1e-4", "fc=1e-3"], "epochs": 3},
        {"max_gpu_mem": 123_456_789, "max_disk": "2GiB", "data": "npz:a 'quoted' \"file\".npz"},
        {"method": "neuroflux", "batch_size": "auto", "views": 2, "augment": "basic", "data": "cifar10"},
    ],
)
def test_what_is_written_makes_the_same_configuration_again(tmp_path: Path, given: dict[str, Any]) -> None:
    config = configure(**{**BASE, **given})
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config))
    assert configure(**read_config_file(file)) == config


@pytest.mark.usefixtures("ascii_locale")
def test_a_file_is_utf_8_in_every_locale(tmp_path: Path) -> None:
    config = configure(**{**BASE, "data": "npz:Größe.npz"})
    write_durably(tmp_path / "run.toml", to_toml(config))
    assert configure(**read_config_file(tmp_path / "run.toml")) == config


def test_a_default_that_depends_on_others_is_written_where_it_is_not_taken() -> None:
    config = configure(**BASE, weights="default", epochs=10)
    assert "epochs = [10]" in to_toml(config)
    assert "--epochs 10" in fit_command(config)
    assert "epochs" not in to_toml(configure(**BASE, weights="default"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "epochs = 5\nepohs = 3\nlerning-rate = 1",
            r"there is no option epohs; did you mean 'epochs'\?; there is no option lerning_rate",
        ),
        ("epochs = ", r"run.toml is not TOML: .*; write, for example, epochs = 5"),
    ],
)
def test_a_file_that_cannot_be_taken_is_refused_with_all_its_faults(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config_file(tmp_path / "run.toml")


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml cannot be read: no such file or directory; give a TOML file"):
        read_config_file(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["epochs"], "--set 'epochs' is not KEY=VALUE"),
        (["model.width=3"], "--set: there is no option model.width"),
        (
            ["model_arg=width=3"],
            "--set 'model_arg=width=3' has no name of an argument; write, for example, --set model_arg.width=64",
        ),
        (["x=1", "y=2"], "x.*y"),
        (
            ["x=1", "epochs=no", "lr=0"],
            "^--set: there is no option x; --epochs 'no': must be a valid integer.*; --lr '0': must be greater than 0$",
        ),
    ],
)
def test_settings_that_cannot_be_taken_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(settings)


def test_the_command_line_counts_before_set_and_set_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text('max-gpu-mem = "1GB"\nmodel = "mlp:64-10"\ndata = "digits"\nepochs = 1\nlr = 0.1\nseed = 1\n')
    shown = lowmem_pnn("fit --config run.toml --set lr=0.2 --set epochs=2 --epochs 3 --print-config")
    assert shown.code == 0, shown.err
    assert shown.out == (
        'max_gpu_mem = "1GB"\nmodel = "mlp:64-10"\ndata = "digits"\nmethod = "pnn"\nepochs = [3]\nlr = [0.2]\nseed = 1\n'
    )


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("--set model_arg.width=32", {"width": 32, "depth": 3}),
        ("--model-arg width=32", {"width": 32, "depth": 3}),
        ("--set model_arg.width=32 --set model_arg.act=gelu --model-arg width=8", {"width": 8, "depth": 3, "act": "gelu"}),
    ],
)
def test_arguments_of_a_factory_are_given_one_by_one_over_those_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, arguments: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(to_toml(configure(**{**BASE, "model": "net.py:build", "model_arg": {"width": 16, "depth": 3}})))
    shown = lowmem_pnn(f"fit --config run.toml {command} --print-config")
    assert shown.code == 0, shown.err
    Path("again.toml").write_text(shown.out)
    assert read_config_file(Path("again.toml"))["model_arg"] == arguments


def test_an_option_that_may_be_repeated_may_be_set_again_and_again() -> None:
    assert read_settings(["lr_for=a.*=1", "lr_for=b=2", "sample=x, y", "epochs=1", "epochs=2"]) == {
        "lr_for": ["a.*=1", "b=2"],
        "sample": ["x, y"],
        "epochs": "2",
    }
