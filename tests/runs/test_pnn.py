"""PNN: the same bits as plain loops with all of its options, partitions that train alone, and labels that follow from the seed."""

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lowmem_pnn
from helpers import networks
from helpers.plainloops import (
    assert_same_weights,
    built,
    loaded,
    parts_at,
    recover_plainly,
    stop_at,
    train_by_exact,
    train_by_pnn,
    training_split,
)
from helpers.small_networks import Data, images, small_conv, small_mlp, small_tokens, vectors
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import ConfigError, Stopped
from lowmem_pnn.methods import SyntheticLabels, Visit, make_method
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.commits import Commits, Save, nothing_changed
from lowmem_pnn.run.process import Process
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.stores.keys import weight_key
from lowmem_pnn.tasks.classification import Classification
from lowmem_pnn.training import start

CPU = torch.device("cpu")
DISTRIBUTIONS = ["uniform", "normal", "orthogonal", "sparse"]
# Cuts by layer, and the modules that they stand before.
CUTS: dict[str, tuple[Callable[[], Any], Data, str, list[int]]] = {
    "mlp": (small_mlp, vectors(), "1,2", [2, 4]),
    "conv": (small_conv, images(), "1,2", [4, 9]),
    "tokens": (small_tokens, vectors(), "1,2", [3, 5]),
}
# 36 samples for training, of 40, make a short last batch.
COMMON: dict[str, Any] = {
    "epochs": (2, 3, 2), "lr": (0.01, 0.02, 0.005), "batch_size": (10, 16, 12), "kappa": (2.0, 5.0), "optimizer": "adam", "seed": 1,
}  # fmt: skip


def fit(build: Callable[[], nn.Module], data: Data, folder: Path, **options: Any) -> Result:
    return lowmem_pnn.fit(build, data, max_gpu_mem="400MB", device="cpu", workdir=folder, **options)


def check_equal(kind: str, folder: Path, **options: Any) -> tuple[Result, nn.Module]:
    """A run has the weights and buffers of the plain loops; both are returned."""
    build, data, cuts, starts = CUTS[kind]
    options = {**COMMON, **options}
    result = fit(build, data, folder, cuts=cuts, **options)
    assert result.oom_retries == 0
    expected = train_by_pnn(build, starts, data, **options)
    assert_same_weights(loaded(build, result.weights_file), expected)
    return result, expected


# The same bits as plain PyTorch.


@pytest.mark.parametrize(
    ("kind", "optimizer", "shuffle"),
    [("conv", ("sgd", "adam", "adamw"), (False, True, False)), ("mlp", ("adamw", "sgd", "sgd"), (True, False, True))],
    ids=["conv", "mlp"],
)
def test_an_optimizer_and_an_order_per_partition_are_same_as_plain_loops(
    kind: str, optimizer: tuple[str, ...], shuffle: tuple[bool, ...], tmp_path: Path
) -> None:
    check_equal(kind, tmp_path / "run", optimizer=optimizer, shuffle=shuffle, weight_decay=0.01, micro_batch=7)


@pytest.mark.parametrize("sil", DISTRIBUTIONS[1:])  # the first is the default, everywhere else
def test_labels_of_every_distribution_are_same_as_a_plain_loop(sil: str, tmp_path: Path) -> None:
    check_equal("conv", tmp_path / "run", sil=sil)


@pytest.mark.parametrize("kind", ["conv", "tokens"])
def test_labels_of_means_are_same_as_a_plain_loop(kind: str, tmp_path: Path) -> None:
    _, found = check_equal(kind, tmp_path / "run", sil_target="pooled")
    build, data, _, starts = CUTS[kind]
    full = train_by_pnn(build, starts, data, **COMMON)
    assert not torch.equal(next(found.parameters()), next(full.parameters()))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mlp", {}),
        ("tokens", {"sil": "sparse", "micro_batch": 4}),
        ("conv", {"sil": "sparse", "micro_batch": 4}),
        ("conv", {"shuffle": False, "val_fraction": 0.0}),
        ("conv", {"shuffle": (True, False, True), "optimizer": ("sgd", "adam", "adamw")}),
        ("conv", {"clip_norm": 0.5, "lr_schedule": "cosine", "warmup_steps": 2, "label_smoothing": 0.1, "sil": "orthogonal"}),
    ],
    ids=["plain", "tokens", "sparse", "unshuffled", "mixed", "clipped"],
)
def test_partitions_from_labels_to_labels_are_same_as_plain_loops(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    check_equal(kind, tmp_path / "run", parallel_sil=True, **options)
    assert not list((tmp_path / "run").glob("activations/*"))


def test_the_joined_model_is_validated_as_a_whole(tmp_path: Path) -> None:
    build, (x, y), cuts, _ = CUTS["conv"]
    val = images(20, seed=5)
    result = lowmem_pnn.fit(
        build, (x, y), val, test=val, max_gpu_mem="400MB", device="cpu", workdir=tmp_path / "run", cuts=cuts, parallel_sil=True, **COMMON
    )  # fmt: skip
    with torch.no_grad():
        scores = loaded(build, result.weights_file)(val[0])
    assert result.val_accuracy == result.test_accuracy == pytest.approx(float((scores.argmax(1) == val[1]).float().mean()))
    assert result.val_loss == pytest.approx(float(nn.functional.cross_entropy(scores, val[1])), rel=1e-5)
    measured = {line["partition"]: line["val_loss"] is not None for line in epoch_lines(tmp_path / "run")}
    assert measured == {0: True, 1: False, 2: False}, "labels as inputs are no validation set"


@pytest.mark.parametrize(
    "options",
    [
        {"parallel_sil": True},
        {"parallel_sil": True, "shuffle": False, "optimizer": ("sgd", "adam", "adamw"), "recover": "all"},
        {"shuffle": (True, False, True), "optimizer": ("adamw", "sgd", "adam"), "recover": (1, 3), "clip_norm": 0.5},
    ],
    ids=["parallel", "parallel mixed", "mixed"],
)
def test_recovery_after_them_is_same_as_a_plain_loop(options: dict[str, Any], tmp_path: Path) -> None:
    build, data, cuts, starts = CUTS["conv"]
    options = {**COMMON, "recovery_epochs": 2, **options}
    recovering = {None: [0, 1], "all": [0, 1, 2], (1, 3): [0, 2]}[options.get("recover")]
    result = fit(build, data, tmp_path / "run", cuts=cuts, **options)
    expected = recover_plainly(train_by_pnn(build, starts, data, **options), starts, data, recovering, **options)  # type: ignore[arg-type]
    assert_same_weights(loaded(build, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss


@pytest.mark.parametrize("shuffle", [True, False])
def test_exact_training_has_an_optimizer_per_partition_too(shuffle: bool, tmp_path: Path) -> None:
    build, data, cuts, starts = CUTS["conv"]
    options: dict[str, Any] = {
        "method": "exact", "epochs": 2, "batch_size": 10, "lr": (0.01, 0.02, 0.005), "optimizer": ("sgd", "adam", "adamw"),
        "shuffle": shuffle, "seed": 1,
    }  # fmt: skip
    result = fit(build, data, tmp_path / "run", cuts=cuts, **options)

    def parameters(model: nn.Sequential) -> list[list[nn.Parameter]]:
        return [list(part.parameters()) for part in parts_at(model, starts)]

    expected = train_by_exact(build, data, parts_of=parameters, **options)
    assert_same_weights(loaded(build, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss


# Going on, and what stays as it is.


def test_partitions_from_labels_to_labels_that_were_stopped_and_resumed_are_same_as_uninterrupted(tmp_path: Path) -> None:
    config = configure(
        max_gpu_mem="100MB", device="cpu", model="mlp:64-32-32-10", data="digits", partitions=3, parallel_sil=True, epochs=(2, 3, 2),
        batch_size=32, train_limit=100, shuffle=(True, False, True), recovery_epochs=1, commit_every=0.0, log_every=1,
    )  # fmt: skip
    whole = start.begin(config, tmp_path / "whole")
    assert whole is not None
    # 90 samples make 3 batches an epoch: the partitions come to 6, 9 and 6 of them, the recovery to 3.
    for batch in (8, 17, 22):
        folder = tmp_path / str(batch)
        with pytest.raises(Stopped):
            start.begin(config, folder, process=Process(should_stop=stop_at(batch)))
        result = start.resume(folder)
        assert result is not None
        assert result.resumed == 1
        assert Path(result.weights_file).read_bytes() == Path(whole.weights_file).read_bytes()
        assert (result.train_loss, result.val_loss, result.macs) == (whole.train_loss, whole.val_loss, whole.macs)
        places = [
            [(line["visit"], line.get("step"), line["macs"]) for line in lines(run)] for run in (folder, tmp_path / "whole")
        ]
        assert places[0] == places[1]


def test_a_partition_without_weights_to_train_is_passed_over(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = small_mlp()
        assert isinstance(model, nn.Sequential)
        model[2].requires_grad_(False)
        return model

    start = built(build).state_dict()
    for parallel in (False, True):
        result = fit(build, vectors(), tmp_path / str(parallel), cuts="1,2", epochs=2, parallel_sil=parallel)
        found = loaded(build, result.weights_file).state_dict()
        changed = {name for name in start if not torch.equal(start[name], found[name])}
        assert changed == {"0.weight", "0.bias", "4.weight", "4.bias"}


def test_outputs_that_are_written_have_their_lines_in_the_log(tmp_path: Path) -> None:
    fit(small_mlp, vectors(), tmp_path / "run", cuts="1,2", epochs=1)
    written = [(line["partition"], line["split"]) for line in lines(tmp_path / "run") if line["action"] == "emit"]
    assert written == [(0, "train"), (0, "val"), (1, "train"), (1, "val")]
    fit(small_mlp, vectors(), tmp_path / "parallel", cuts="1,2", epochs=1, parallel_sil=True)
    assert {line["action"] for line in lines(tmp_path / "parallel")} == {"learn"}


def test_a_class_for_each_token_is_refused(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 9))

    tokens = torch.randint(9, (20, 5), generator=torch.Generator().manual_seed(0))
    for options in ({}, {"parallel_sil": True}, {"sil_target": "pooled"}):
        with pytest.raises(
            ConfigError, match=r"--method pnn needs a class for each sample, and data .* has one for each token; use"
        ):
            fit(build, (tokens, tokens.roll(-1, 1)), tmp_path / "run", partitions=2, epochs=1, **options)
    assert not (tmp_path / "run").exists()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def epoch_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines(folder) if "train_loss" in line]


# Partitions train alone, however many there are.

# What each partition's file holds: weights, buffers, the optimizer's state.
Files = list[dict[str, Tensor]]


def commits_of(
    build: Callable[[], nn.Module], data: Data, folder: Path, **options: Any
) -> tuple[Result, list[tuple[int, Files]]]:
    """A run that commits after every batch; for each commit the visit that comes next, and all files."""
    seen: list[tuple[int, Files]] = []
    commit = Commits.commit

    def read(commits: Commits, save: Save = nothing_changed) -> None:
        commit(commits, save)
        weights = commits._weights
        with weights.tensor_reader() as reader:
            files = [{key: reader.read(key) for key in weights.layout(part)} for part in range(weights.num_partitions)]
        seen.append((commits._state.visit, files))

    with mock.patch.object(Commits, "commit", read):
        return fit(build, data, folder, commit_every=0.0, **options), seen


@st.composite
def trainings(draw: st.DrawFn) -> tuple[list[int], dict[str, Any]]:
    """Widths of a multilayer perceptron, and options that cut it into 1 to all of its layers."""
    widths = [12, *draw(st.lists(st.integers(4, 16), max_size=4)), 4]
    partitions = draw(st.integers(1, len(widths) - 1))

    def each(values: st.SearchStrategy[Any]) -> Any:
        return tuple(draw(st.lists(values, min_size=partitions, max_size=partitions)))

    options = {
        "partitions": partitions,
        "epochs": each(st.integers(1, 2)),
        "batch_size": each(st.integers(8, 40)),
        "optimizer": each(st.sampled_from(["adam", "adamw"])),
        "shuffle": each(st.booleans()),
        "sil": draw(st.sampled_from(DISTRIBUTIONS)),
        "parallel_sil": draw(st.booleans()),
        "val_fraction": draw(st.sampled_from([0.0, 0.2])),
        "seed": draw(st.integers(0, 1000)),
    }
    return widths, options


@given(trainings())
@settings(max_examples=8, deadline=None)
def test_earlier_partitions_are_done_and_later_ones_untouched_while_a_partition_trains(
    training: tuple[list[int], dict[str, Any]],
) -> None:
    widths, options = training
    with tempfile.TemporaryDirectory() as folder:
        result, seen = commits_of(lambda: networks.mlp(*widths), vectors(), Path(folder, "run"), **options)
        exported = loaded(lambda: networks.mlp(*widths), result.weights_file).state_dict()
    start = built(lambda: networks.mlp(*widths), options["seed"]).state_dict()
    splits: list[Any] = ["train", "val"] if options["val_fraction"] else ["train"]
    program = make_method(configure(max_gpu_mem="1GB", model="python:model", data="python:data", **options)).program(
        options["partitions"], splits
    )
    learning = [item.partition for item in program if isinstance(item, Visit) and item.action == "learn"]
    assert learning == list(range(options["partitions"]))
    assert seen[0][0] == 0
    assert seen[-1][0] == len(program)

    for (visit, before), (_, after) in itertools.pairwise(seen):
        item = program[visit] if visit < len(program) else None
        assert item is None or isinstance(item, Visit)
        # The optimizer counts its steps, so that every batch that was learnt from shows.
        learns = item.partition if item is not None and item.action == "learn" else None
        changed = {number for number in range(len(before)) if not same(before[number], after[number])}
        assert changed == ({learns} if learns is not None else set())

    for partition in range(options["partitions"]):
        turn = next(number for number, item in enumerate(program) if isinstance(item, Visit) and item.partition == partition)
        first = next(files for visit, files in seen if visit == turn)
        names = [name for name in start if weight_key(name) in first[partition]]
        assert names
        for name in names:
            assert torch.equal(first[partition][weight_key(name)], start[name]), f"{name} before its turn"
            assert torch.equal(seen[-1][1][partition][weight_key(name)], exported[name]), f"{name} afterwards"


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# Labels follow from the seed.


def codes_of(config: FitConfig, boundaries: list[tuple[TensorSpec, ...]], num_classes: int) -> list[Tensor]:
    """The labels at all boundaries."""
    method = make_method(config)
    codes: list[Tensor] = []
    for partition, boundary in enumerate(boundaries):
        task = Classification(Targets("class", num_classes))
        objective = method.objective(partition, len(boundaries) + 1, boundary, task)
        assert isinstance(objective, SyntheticLabels)
        objective.prepare(CPU)
        codes += objective.class_vectors
    return codes


@given(
    st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=2, unique=True),
    st.lists(st.integers(1, 2), min_size=1, max_size=5),
    st.integers(2, 12),
    st.sampled_from(DISTRIBUTIONS),
    st.sampled_from(["full", "pooled"]),
)
@settings(deadline=None)
def test_labels_of_one_seed_are_identical_and_of_two_seeds_and_boundaries_differ(
    seeds: list[int], tensors: list[int], num_classes: int, sil: str, target: str
) -> None:
    specs = TensorSpec((70,), torch.float32), TensorSpec((70, 3, 3), torch.float32)
    boundaries = [specs[:number] for number in tensors]
    configs = [
        configure(max_gpu_mem="1GB", model="mlp:4-4", data="digits", sil=sil, sil_target=target, seed=seed)
        for seed in (seeds[0], seeds[0], seeds[1])
    ]
    first, again, other = (codes_of(config, boundaries, num_classes) for config in configs)
    assert len(first) == sum(tensors)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(first, 2))


@pytest.mark.parametrize("parallel", [False, True])
def test_what_a_partition_learns_are_the_labels_of_its_own_samples(parallel: bool, tmp_path: Path) -> None:
    # A partition of one layer with enough freedom ends at the code of each sample's class, if it was told the right ones.
    data = vectors(200)
    split = training_split(data, seed=2)
    options: dict[str, Any] = {"epochs": (60, 1), "lr": (0.02, 1e-9), "optimizer": "adam", "kappa": 3.0, "seed": 2}
    result = fit(lambda: networks.mlp(12, 40, 4), data, tmp_path / "run", cuts="1", parallel_sil=parallel, **options)
    model = loaded(lambda: networks.mlp(12, 40, 4), result.weights_file)
    assert isinstance(model, nn.Sequential)
    x, y = split.batch(torch.arange(len(split)).numpy())
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", **options)
    [codes] = codes_of(config, [(TensorSpec((40,), torch.float32),)], 4)
    with torch.no_grad():
        distances = torch.cdist(model[:2](x), codes)
    assert float((distances.argmin(1) == y).float().mean()) > 0.95
