"""Commands and files that repeat a run: for every option they make the same configuration again."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import lowmem_pnn
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig, default_of, field_names
from lowmem_pnn.settings.command import fit_command, option_words
from lowmem_pnn.settings.config_file import read_config_file, to_toml

BASE: dict[str, Any] = {"max_gpu_mem": "1GB", "model": "mlp:64-10", "data": "digits"}
NUMBER = 0.123456789012
EXACT: dict[str, Any] = {"method": "exact"}
NEUROFLUX: dict[str, Any] = {"method": "neuroflux"}
CUDA: dict[str, Any] = {"device": "cuda"}
TEXT: dict[str, Any] = {"model": "gpt:layers=1", "data": "jsonl:a.jsonl"}
PHOTOS: dict[str, Any] = {"data": "imagefolder:photos"}

# For each option a value that is not the default, and what it needs beside it.
CASES: dict[str, dict[str, Any]] = {
    "local_loss": {**NEUROFLUX, "local_loss": "both"},
    "meta_epochs": {"method": "incubate", "meta_epochs": 4},
    "visits": {**NEUROFLUX, "visits": "laps=2"},
    "macro_batches": {**NEUROFLUX, "visits": "interleaved", "macro_batches": 9},
    "betas": {"betas": (0.8, NUMBER)},
    "eps": {"eps": 1.23456789e-9},
    "no_decay": {"weight_decay": 0.1, "no_decay": "*.bias,a b"},
    "no_decay_norms": {"weight_decay": 0.1, "no_decay_norms": True},
    "min_lr": {"lr_schedule": "cosine", "min_lr": 1.23456789e-6},
    "max_steps": {**EXACT, "max_steps": 5},
    "early_stop": {**EXACT, "early_stop": 2},
    "keep_weights": {**EXACT, "keep_weights": "best"},
    "keep_state": {**EXACT, "keep_state": True},
    "monitor": {**EXACT, "early_stop": 2, "monitor": "max:val_accuracy"},
    "eval_every": {**EXACT, "eval_every": 50},
    "time_limit": {"time_limit": "1h30m0.125s"},
    "lora": {"lora": f"r=4,alpha={8 + NUMBER},targets=a+b,dropout={NUMBER}"},
    "modules_to_save": {"lora": "r=4", "modules_to_save": "fc,head"},
    "weights_dtype": {"weights_dtype": "bf16"},
    "frozen_dtype": {"freeze": "0.*", "frozen_dtype": "int8"},
    "weights": {"weights": "some file.pt"},
    "train_only": {"train_only": "a.*,b"},
    "freeze": {"freeze": "a.*,b"},
    "freeze_norm": {"freeze_norm": True},
    "unfreeze_at": {**EXACT, "freeze": "0.*", "unfreeze_at": 1},
    "lr_for": {"lr_for": [f"a.*={NUMBER}", "b=1"]},
    "cache_frozen": {**EXACT, "cache_frozen": False},
    "task": {"task": "regression"},
    "loss": {"loss": "l1"},
    "class_weights": {"class_weights": (NUMBER, 2)},
    "label_smoothing": {"label_smoothing": NUMBER},
    "ignore_index": {"ignore_index": -100},
    "tokenizer": {**TEXT, "tokenizer": "tokens"},
    "context": {**TEXT, "context": 9},
    "target_context": {**TEXT, "model": "hf:config.json", "target_context": 9},
    "pack": {**TEXT, "pack": True},
    "sample": {**TEXT, "sample": ("a, b", "it's", "-x")},
    "sample_tokens": {**TEXT, "sample": "a", "sample_tokens": 3},
    "loss_on": {**TEXT, "loss_on": "all"},
    "data": {"data": "npz:a 'quoted' \"file\".npz"},
    "target": {"data": "csv:a.csv", "target": ["a,b", "c d", 'the "e"']},
    "val_data": {"val_data": "npz:val.npz"},
    "test_data": {"test_data": "npz:test.npz"},
    "data_root": {"data": "cifar10", "data_root": "there"},
    "image_size": {**PHOTOS, "image_size": "240x320"},
    "resize": {**PHOTOS, "image_size": 8, "resize": "pad"},
    "normalize": {**PHOTOS, "normalize": ((0.5, NUMBER), (0.2, 0.1))},
    "augment": {**PHOTOS, "augment": "trivial"},
    "mixup": {**PHOTOS, **EXACT, "mixup": NUMBER},
    "cutmix": {**PHOTOS, **EXACT, "cutmix": NUMBER},
    "workers": {"workers": 2},
    "val_fraction": {"val_fraction": NUMBER},
    "test_fraction": {"test_fraction": NUMBER},
    "train_limit": {"train_limit": 1_000_000},
    "test_limit": {"test_limit": 7},
    "skip_broken": {**PHOTOS, "skip_broken": True},
    "max_gpu_mem": {"max_gpu_mem": 123_456_789},
    "model": {"model": "resnet18"},
    "model_arg": {
        "model": "it.py:build",
        "model_arg": {"a": NUMBER, "b": "gelu", "c": "0.5", "d": None, "e": True, "f": [8, 16], "g": "true", "h": (1, (2,))},
    },
    "method": NEUROFLUX,
    "partitions": {"partitions": 3},
    "cuts": {"cuts": "1,layer2"},
    "epochs": {"epochs": "5,160"},
    "batch_size": {"batch_size": "auto"},
    "micro_batch": {"micro_batch": 4},
    "plan_for": {"plan_for": "size"},
    "optimizer": {"optimizer": "sgd,adam"},
    "lr": {"lr": (2.3456789e-5, 1.0)},
    "lr_schedule": {"lr_schedule": "cosine"},
    "warmup_steps": {"warmup_steps": 3},
    "momentum": {"optimizer": "sgd", "momentum": NUMBER},
    "weight_decay": {"weight_decay": NUMBER},
    "shuffle": {"shuffle": "yes,no"},
    "drop_last": {"drop_last": True},
    "fused": {"fused": False},
    "step_in_backward": {"step_in_backward": False},
    "recompute": {**EXACT, "recompute": "never"},
    "optimizer_state": {"optimizer_state": "bf16"},
    "clip_norm": {**TEXT, "weights": "some file.pt", "clip_norm": 0},
    "loss_chunk": {"loss_chunk": 7},
    "recovery_epochs": {"recovery_epochs": 2},
    "recover": {"recovery_epochs": 2, "recover": "1,2"},
    "kappa": {"kappa": NUMBER},
    "sil": {"sil": "normal"},
    "sil_target": {"sil_target": "pooled"},
    "parallel_sil": {"parallel_sil": True},
    "views": {**PHOTOS, **NEUROFLUX, "augment": "basic", "views": 2},
    "blocks": {**NEUROFLUX, "blocks": "alike"},
    "block_tolerance": {**NEUROFLUX, "blocks": "alike", "block_tolerance": NUMBER},
    "heads": {**NEUROFLUX, "heads": "linear"},
    "exit_tolerance": {**NEUROFLUX, "exit_tolerance": NUMBER},
    "activation_dtype": {"activation_dtype": "int8"},
    "seed": {"seed": 2**40 + 1},
    "device": {"device": "cuda:1"},
    "precision": {"precision": "bf16"},
    "tf32": {**CUDA, "tf32": True},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
    "batch_norm": {"batch_norm": "refuse"},
    "compare": {"compare": False},
    "budget_scope": {**CUDA, "budget_scope": "allocator"},
    "max_host_mem": {**CUDA, "max_host_mem": "1500kB"},
    "host_tier": {**CUDA, **EXACT, "host_tier": False},
    "max_disk": {"max_disk": 1025},
    "drive_tbw": {"drive_tbw": 600 + NUMBER},
    "commit_every": {"commit_every": NUMBER},
    "keep_commits": {"keep_commits": 3},
    "log_every": {"log_every": 1_000_000},
    "logger": {"logger": "wandb"},
}


def of_file(text: str, folder: Path) -> FitConfig:
    (folder / "run.toml").write_text(text)
    return configure(**read_config_file(folder / "run.toml"))


def of_command(command: str, folder: Path) -> FitConfig:
    shown = lowmem_pnn(*shlex.split(command)[1:], "--print-config")
    assert shown.code == 0, shown.err
    return of_file(shown.out, folder)


def test_there_is_a_case_for_every_option() -> None:
    assert set(CASES) == set(field_names())


@pytest.mark.parametrize("name", CASES)
def test_command_and_file_of_a_configuration_make_it_again(name: str, tmp_path: Path) -> None:
    config = configure(**{**BASE, **CASES[name]})
    assert getattr(config, name) != default_of(name) or name == "clip_norm"
    assert of_file(to_toml(config), tmp_path) == config
    # Where data lay is of the machine, and not in the command.
    again = of_command(fit_command(config), tmp_path)
    assert dataclasses.replace(again, data_root=config.data_root) == config


def test_a_value_that_is_none_where_the_default_is_not_is_given_as_one_types_it() -> None:
    config = configure(**{**BASE, **CASES["clip_norm"]})
    assert option_words(config)[-2:] == ["--clip-norm", "0"]
    assert "clip_norm = 0\n" in to_toml(config)


def test_a_switch_that_is_off_where_the_default_is_on_is_given_by_its_name(tmp_path: Path) -> None:
    config = configure(**{**BASE, **TEXT}, weights="some file.pt", weight_decay=0.1, no_decay_norms=False)
    assert option_words(config)[-1] == "--decay-norms"
    assert of_command(fit_command(config), tmp_path) == config


def test_options_are_named_wherever_the_command_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(**BASE, weights="default", epochs=10)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "--epochs 10" in fit_command(config)
    assert "epochs = [10]" in to_toml(config)
    assert "data_root" not in to_toml(config)


def test_options_that_alone_make_training_possible_are_named(tmp_path: Path) -> None:
    # A folder with weights is begun with them by default, and `incubate` cannot.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 300}))
    (tmp_path / "model.safetensors").touch()
    config = configure(**{**BASE, "model": f"hf:{tmp_path}"}, method="incubate", weights="none", seed=3)
    command = fit_command(config)
    assert command.endswith("--method incubate --weights none --seed 3")
    assert of_command(command, tmp_path) == config
