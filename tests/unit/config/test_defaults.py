"""Defaults of fine-tuning: what they are, and that any option overrides them."""

from typing import Any

import pytest

from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.defaults import training_defaults, training_facts, training_words


def asked(**options: Any) -> Any:
    return configure(max_gpu_mem="1GB", model="gpt:layers=1", **options)


def test_language_with_weights() -> None:
    config = asked(data="jsonl:a", weights="w.safetensors")
    assert (config.method, config.epochs, config.lr, config.lr_schedule) == ("exact", (3,), (2e-5,), "linear")
    assert (config.weight_decay, config.clip_norm) == (0.0, 1.0)
    assert training_words(config) == "exact, 3 epochs, adamw, lr 2e-05 linear, weight decay 0, clipping at 1"
    assert training_facts(config)["lr"] == 2e-5


def test_options_override_them() -> None:
    config = asked(data="text:a", weights="w", lr=1e-3, clip_norm=0, lr_schedule="cosine", epochs=1)
    assert (config.lr, config.clip_norm, config.lr_schedule, config.epochs) == ((1e-3,), None, "cosine", (1,))


def test_weight_decay_leaves_out_norms_and_biases_as_trainers_does() -> None:
    given = {"data": "text:a", "weights": "w", "weight_decay": "0.01"}
    assert asked(**given).no_decay_norms
    assert not asked(**given, no_decay_norms=False).no_decay_norms
    assert not asked(**{**given, "weights": "none"}).no_decay_norms


@pytest.mark.parametrize("zero", [0, 0.0, "0", "0.0"])
def test_clipping_is_left_out_however_zero_is_written(zero: Any) -> None:
    assert asked(data="text:a", weights="w", clip_norm=zero).clip_norm is None


def test_other_trainings_keep_theirs() -> None:
    assert asked(data="jsonl:a").lr == (1e-3,)
    assert asked(data="jsonl:a", weights="none").lr_schedule == "constant"
    assert asked(data="parquet:a", weights="w").clip_norm is None
    assert asked(data="parquet:a", weights="w", tokenizer="bytes").clip_norm == 1.0
    assert training_defaults(pretrained=False, language=True) == {}
