"""Configurations: what is refused, in which words, and what is kept."""

import math
import re
from pathlib import Path

import pytest

from lowmem_pnn.config.configure import DEMONSTRATION, configure, for_method, given_options
from lowmem_pnn.config.fit_config import METHODS, FitConfig, MethodName
from lowmem_pnn.errors import ConfigError


def make(**options: object) -> FitConfig:
    return configure(**{"max_gpu_mem": "1GB", "model": "mlp:64-10", "data": "digits", **options})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_gpu_mem": "512 megs"}, "--max-gpu-mem: '512 megs' is not a size; write 512MB or 512MiB"),
        ({"max_gpu_mem": "0"}, "--max-gpu-mem: '0' is a size of 0 bytes; write a positive one, as 512MB or 512MiB"),
        ({"max_gpu_mem": None}, "--max-gpu-mem is missing; give --max-gpu-mem 2GB"),
        ({"model": None}, "--model is missing; give --model mlp:64-256-10, or what else lowmem-pnn models lists"),
        ({"data": None}, "--data is missing; give --data digits, or what else lowmem-pnn data lists"),
        ({"method": "pnm"}, "--method 'pnm' is none of pnn, neuroflux, incubate, exact, backprop; did you mean 'pnn'?"),
        ({"method": "PNX"}, "--method 'pnx' is none of pnn, neuroflux, incubate, exact, backprop; did you mean 'pnn'?"),
        ({"optimizer": "adamm"}, "--optimizer 'adamm' is none of sgd, adam, adamw; did you mean 'adam'?"),
        ({"optimizer": "sgd,sgdd"}, "--optimizer 'sgdd' is none of sgd, adam, adamw; did you mean 'sgd'?"),
        ({"optimizer": ()}, "--optimizer () is empty; give one value, or one per partition"),
        ({"shuffle": "maybe"}, "--shuffle 'maybe' is none of yes, no"),
        ({"shuffle": "yes,2,no,2"}, "--shuffle '2' is none of yes, no"),
        ({"shuffle": 2}, "--shuffle 2 is none of yes, no"),
        ({"sil": "Sparse"}, "--sil 'Sparse' is none of uniform, normal, orthogonal, sparse; did you mean 'sparse'?"),
        ({"sil_target": "pool"}, "--sil-target 'pool' is none of full, pooled; did you mean 'pooled'?"),
        ({"optimiser": "adam"}, "there is no option --optimiser; did you mean 'optimizer'?"),
        ({"device": "CPU"}, "--device 'CPU' is none of auto, cpu, cuda, cuda:INDEX; did you mean 'cpu'?"),
        ({"device": "cuda:x"}, "--device 'cuda:x' is none of auto, cpu, cuda, cuda:INDEX; did you mean 'cuda'?"),
        ({"lr": "0"}, "--lr '0': must be greater than 0"),
        ({"lr": "inf"}, "--lr 'inf': must be a finite number"),
        ({"lr": math.nan}, "--lr nan: must be a finite number"),
        ({"lr": "fast"}, "--lr 'fast': must be a valid number, unable to parse string as a number"),
        ({"lr": ","}, "--lr ',': there is nothing between two commas, or nothing at all; write one value, or several as A,B"),
        ({"cuts": ""}, "--cuts '': there is nothing between two commas, or nothing at all; write one value, or several as A,B"),
        ({"epochs": "0"}, "--epochs '0': must be greater than 0"),
        ({"epochs": "1.5"}, "--epochs '1.5': must be a valid integer, unable to parse string as an integer"),
        ({"epochs": ()}, "--epochs () is empty; give one value, or one per partition"),
        ({"seed": "-1"}, "--seed '-1': must be greater than or equal to 0"),
        ({"seed": 2**63}, "--seed 9223372036854775808: must be less than 9223372036854775808"),
        ({"val_fraction": "1"}, "--val-fraction '1': must be less than 1"),
        ({"weight_decay": "-1"}, "--weight-decay '-1': must be greater than or equal to 0"),
        ({"keep_commits": 0}, "--keep-commits 0: must be greater than 0"),
        ({"train_limit": "0"}, "--train-limit '0': must be greater than 0"),
        ({"momentum": 0.5}, "--momentum has no effect here: it needs --optimizer sgd"),
        (
            {"method": "pnn", "recompute": "never"},
            "--recompute has no effect here: it needs --method exact, or --recovery-epochs",
        ),
        (
            {"method": "pnn", "views": 2, "augment": "basic"},
            "--views has no effect here: it needs --method neuroflux or incubate",
        ),
        (
            {"method": "neuroflux", "loss_chunk": 8},
            "--loss-chunk has no effect here: it needs --method pnn, incubate, exact or backprop "
            "(every unit of neuroflux has a loss of its own)",
        ),
        ({"method": "backprop", "cuts": "1"}, "--cuts has no effect here: it needs --method pnn, neuroflux, incubate or exact"),
        ({"momentum": 0.5, "optimizer": "adam,adamw"}, "--momentum has no effect here: it needs --optimizer sgd"),
        ({"method": "backprop", "kappa": 3}, "--kappa has no effect here: it needs --method pnn"),
        ({"method": "exact", "sil": "uniform"}, "--sil has no effect here: it needs --method pnn"),
        ({"method": "exact", "sil_target": "full"}, "--sil-target has no effect here: it needs --method pnn"),
        ({"method": "backprop", "parallel_sil": True}, "--parallel-sil has no effect here: it needs --method pnn"),
        (
            {"method": "exact", "recompute": "never", "compile": True},
            "--recompute never keeps the products of single operations, and --compile makes code in which nobody sees them; leave one out",
        ),
        (
            {"method": "exact", "shuffle": "yes,no"},
            "--shuffle has 2 values, and --method exact trains all partitions together; give one value",
        ),
        (
            {"parallel_sil": True, "ignore_index": 3},
            "--parallel-sil learns from the vectors of the classes, and --ignore-index leaves one out; leave one out",
        ),
        (
            {"parallel_sil": True, "sil_target": "pooled"},
            "--parallel-sil needs labels that a partition can take as inputs, and --sil-target pooled has none; leave one out",
        ),
        (
            {"method": "exact", "keep_state": True, "early_stop": 2},
            "--keep-state is for training a run further, which one with --early-stop 2 cannot be; leave one of them out",
        ),
        (
            {"method": "exact", "keep_state": True, "lr_schedule": "linear"},
            "--keep-state is for training a run further, which one with --lr-schedule linear cannot be; leave one of them out, or give "
            "--lr-schedule constant",
        ),
        ({"cuts": "1", "partitions": 2}, "--cuts and --partitions exclude each other; give one"),
        ({"device": "cpu", "budget_scope": "allocator"}, "--budget-scope has no effect here: it needs a CUDA device"),
        ({"micro_batch": 128}, "--micro-batch 128 is above --batch-size 64; give at most 64, or a larger --batch-size"),
        (
            {"method": "exact", "lr": "0", "kappa": 3, "min_lr": 1.0},
            "--lr '0': must be greater than 0; --kappa has no effect here: it needs --method pnn; --min-lr has no effect here: it needs "
            "--lr-schedule linear or cosine",
        ),
        (
            {"model": "net.py:build", "model_arg": {"depth": 3, "norm": dict}},
            "--model-arg {'depth': 3, 'norm': <class 'dict'>}: norm is no plain value, such as a number, a text or a list, and nothing else is "
            "kept with a run; make it in a factory of your own",
        ),
        ({"lr": "0", "seed": "-1"}, "--lr '0': must be greater than 0; --seed '-1': must be greater than or equal to 0"),
    ],
)
def test_refused_in_one_line(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(**options)
    assert str(error.value) == text


def test_lists_take_one_value_or_several() -> None:
    config = make(epochs="5,160", lr=0.1, batch_size=[16, 32], cuts="layer1, 3")
    assert (config.epochs, config.lr, config.batch_size, config.cuts) == ((5, 160), (0.1,), (16, 32), ("layer1", "3"))
    assert [config.value_for("epochs", 1), config.value_for("lr", 1)] == [160, 0.1]
    config = make(optimizer="sgd, adamw", shuffle="no,yes")
    assert (config.optimizer, config.shuffle) == (("sgd", "adamw"), (False, True))
    assert [config.value_for("optimizer", 1), config.value_for("shuffle", 0)] == ["adamw", False]
    config = make(optimizer=["adam"], shuffle=False)
    assert (config.optimizer, config.shuffle) == (("adam",), (False,))
    assert (make().optimizer, make().shuffle) == (("adamw",), (True,))


def test_momentum_is_for_whichever_partition_has_sgd() -> None:
    assert make(momentum=0.5, optimizer="adam,sgd").momentum == 0.5


def test_the_demonstration_is_taken_with_neither_model_nor_data() -> None:
    assert configure(max_gpu_mem="2GB").model == DEMONSTRATION["model"]
    assert configure(max_gpu_mem="2GB", epochs=1).epochs == (1,)
    with pytest.raises(ConfigError, match="--data is missing"):
        configure(max_gpu_mem="2GB", model="mlp:64-10")


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("method", "Exact", "exact"), ("model", "ResNet18", "resnet18"), ("model", "MLP:64-10", "mlp:64-10"), ("data", "CIFAR10", "cifar10"),
        ("data", "TEXT:/Books/A.txt", "text:/Books/A.txt"), ("test_data", "Digits", "digits"), ("data", "/My.py:Load", "/My.py:Load"),
        ("model", "Here", "Here"), ("model", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("model", "hf:Qwen/Qwen3", "hf:Qwen/Qwen3"),
    ],
)  # fmt: skip
def test_names_are_taken_in_any_letters(
    name: str, given: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Here").mkdir()
    assert given_options({name: given}) == {name: kept}


def test_paths_are_kept_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make(model="my nets/net.py:build", data="npz:set.npz")
    assert config.model == f"{tmp_path}/my nets/net.py:build"
    assert config.data == f"npz:{tmp_path}/set.npz"
    assert make(data="cifar10", data_root="sets").data_root == tmp_path / "sets"
    assert make(data="imagefolder:a/b").data == f"imagefolder:{tmp_path}/a/b"
    assert make().data_root == tmp_path / "data"
    assert make(model="package.module:build", data="digits").model == "package.module:build"


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (2, "--max-gpu-mem 2 is 2 bytes; did you mean 2GB?"),
        (0.1, "0.1 has no unit; write it as text, '0.1GB'"),
        (True, "True is no size; write 512MB or 512MiB"),
    ],
)
def test_a_budget_without_a_unit_is_asked_about(budget: float, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        configure(max_gpu_mem=budget)


def test_other_methods_do_not_leave_out_what_they_would_train_otherwise() -> None:
    config = configure(
        max_gpu_mem="1GB", model="resnet18", data="cifar10", method="exact", freeze="layer1.*", unfreeze_at=1, epochs=3
    )
    with pytest.raises(ConfigError, match=r"^--unfreeze-at needs --method exact or backprop$"):
        for_method(config, "pnn")
    assert for_method(config, "backprop").unfreeze_at == 1
    assert for_method(config, "exact") is config


@pytest.mark.parametrize(
    ("method", "options", "kept"),
    [
        ("exact", {"recompute": "never"}, {}),
        ("pnn", {"recovery_epochs": 2, "recover": "1", "recompute": "never"}, {"incubate", "exact", "backprop"}),
        ("backprop", {"loss_chunk": 8}, {"pnn", "incubate", "exact"}),
        ("neuroflux", {"augment": "basic", "views": 4}, {"incubate"}),
        ("neuroflux", {"visits": "interleaved", "macro_batches": 8}, {}),
        ("pnn", {"plan_for": "time"}, {"neuroflux", "exact", "backprop"}),
    ],
)
def test_other_methods_leave_out_what_they_do_not_read(method: str, options: dict[str, object], kept: set[MethodName]) -> None:
    config, read_by_all = make(method=method, **options), {name: options[name] for name in ("augment",) if name in options}
    for other in METHODS:
        if other != method:
            expected = make(method=other, **(options if other in kept else read_by_all))
            assert for_method(config, other) == expected, other


def test_an_error_is_not_as_long_as_what_it_is_about() -> None:
    with pytest.raises(ConfigError, match=r"^--val-data \(a list\): must be a valid string") as raised:
        configure(max_gpu_mem="1GB", model="mlp:64-10", data="digits", val_data=[*range(1000)])
    assert len(str(raised.value)) < 100
