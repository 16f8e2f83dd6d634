"""Options of `fit` and `plan` as types, for editors and type checkers: written by docs/fit_options.py from `FitConfig`."""

# ruff: noqa: E501
# fmt: off
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict


class FitOptions(TypedDict, total=False):
    """Options of `fit` and `plan`: fields of `FitConfig`, whose descriptions `lowmem-pnn fit --help-all` shows; None is not given."""

    local_loss: Literal["cross-entropy", "similarity", "both"] | None
    meta_epochs: int | None
    visits: str | None
    macro_batches: int | None
    betas: str | float | Sequence[float] | None
    eps: float | None
    no_decay: str | int | Sequence[str | int] | None
    no_decay_norms: bool | None
    min_lr: float | None
    max_steps: int | None
    early_stop: int | None
    keep_weights: Literal["last", "best"] | None
    keep_state: bool | None
    monitor: str | None
    eval_every: int | None
    time_limit: str | float | None
    lora: str | Mapping[str, Any] | None
    modules_to_save: str | int | Sequence[str | int] | None
    weights_dtype: Literal["fp32", "bf16"] | None
    frozen_dtype: Literal["fp32", "bf16", "int8", "nf4"] | None
    train_only: str | int | Sequence[str | int] | None
    freeze: str | int | Sequence[str | int] | None
    freeze_norm: bool | None
    unfreeze_at: int | None
    lr_for: str | Sequence[str] | Mapping[str, float] | None
    cache_frozen: bool | None
    task: Literal["auto", "classification", "multilabel", "regression", "segmentation", "causal-lm", "masked-lm", "seq2seq", "sequence-classification", "image-classification"] | None
    class_weights: str | Iterable[Any] | None
    label_smoothing: float | None
    ignore_index: int | None
    tokenizer: str | Path | None
    context: int | None
    target_context: int | None
    pack: bool | None
    sample: str | int | Sequence[str | int] | None
    sample_tokens: int | None
    loss_on: Literal["completions", "all"] | None
    target: str | int | Sequence[str | int] | None
    val_data: str | None
    test_data: str | None
    data_root: str | Path | None
    image_size: int | str | Sequence[int] | None
    resize: Literal["crop", "squash", "pad"] | None
    normalize: str | Sequence[float | Sequence[float]] | None
    augment: Literal["none", "basic", "randaugment", "trivial"] | None
    mixup: float | None
    cutmix: float | None
    workers: int | None
    drop_last: bool | None
    val_fraction: float | None
    test_fraction: float | None
    train_limit: int | None
    test_limit: int | None
    skip_broken: bool | None
    model_arg: Mapping[str, Any] | None
    method: Literal["pnn", "neuroflux", "incubate", "exact", "backprop"] | None
    partitions: int | None
    cuts: str | int | Sequence[str | int] | None
    epochs: str | int | Sequence[int] | None
    batch_size: str | int | Sequence[int] | Literal["auto"] | None
    micro_batch: int | None
    plan_for: Literal["auto", "size", "time"] | None
    optimizer: str | Literal["sgd", "adam", "adamw"] | Sequence[Literal["sgd", "adam", "adamw"]] | None
    lr: str | float | Sequence[float] | None
    lr_schedule: Literal["constant", "linear", "cosine", "onecycle"] | None
    warmup_steps: int | None
    momentum: float | None
    weight_decay: float | None
    shuffle: str | bool | Sequence[bool] | None
    fused: bool | None
    step_in_backward: bool | None
    recompute: Literal["auto", "always", "never"] | None
    optimizer_state: Literal["fp32", "bf16", "int8"] | None
    clip_norm: float | None
    loss_chunk: int | None
    recovery_epochs: int | None
    recover: str | int | Sequence[int] | Literal["all"] | None
    kappa: str | float | Sequence[float] | None
    sil: Literal["uniform", "normal", "orthogonal", "sparse"] | None
    sil_target: Literal["full", "pooled"] | None
    parallel_sil: bool | None
    views: int | None
    blocks: Literal["planner", "alike"] | None
    block_tolerance: float | None
    heads: Literal["adaptive", "classic", "auglocal", "linear"] | None
    exit_tolerance: float | None
    activation_dtype: Literal["float32", "bfloat16", "float16", "int8"] | None
    seed: int | None
    device: str | None
    precision: Literal["fp32", "bf16", "fp16"] | None
    tf32: bool | None
    channels_last: bool | None
    compile: bool | None
    batch_norm: Literal["micro", "refuse"] | None
    compare: bool | None
    budget_scope: Literal["process", "allocator"] | None
    max_host_mem: int | str | None
    host_tier: bool | None
    max_disk: int | str | None
    drive_tbw: float | None
    commit_every: float | None
    keep_commits: int | None
    log_every: int | None
    logger: Literal["none", "tensorboard", "wandb", "mlflow"] | None
