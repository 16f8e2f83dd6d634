"""`neuroflux`: units that learn alone, held against plain PyTorch; heads, blocks, batches, exits and their export."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowmem_pnn
from helpers.plainloops import built, loaded, make_optimizer, step_lines, training_split
from helpers.small_networks import Data, conv_layers, images, vectors
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.evaluation.exits import choose_exit
from lowmem_pnn.exporting.export import find_exit
from lowmem_pnn.methods.heads import make_head
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.model.layer import head_prefix
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.samples.batch_mixer import BatchMixer
from lowmem_pnn.seeds import permutation_of, seed_of

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"method": "neuroflux", "epochs": 2, "batch_size": 16, "lr": 0.01, "device": "cpu", "val_fraction": 0.2}


BOUNDS = [0, 4, 7, 11, 12]


def fit(folder: Path, data: Data, build: Any = conv_layers, **options: Any) -> Any:
    return lowmem_pnn.fit(build, data, max_gpu_mem="200MB", workdir=folder, **{**OPTIONS, **options})


def drawn_head(number: int, seed: int, shapes: list[tuple[int, ...]]) -> nn.Module:
    torch.manual_seed(seed_of(seed, "head", number))
    specs = [TensorSpec(shape, torch.float32) for shape in shapes]
    return make_head("adaptive", specs[number], specs[number + 1 :], 4, tokens=False)


class PlainSimilarity(nn.Module):
    """A head, and features whose likeness between samples is compared with that of the samples' classes."""

    def __init__(self, head: nn.Module, shape: tuple[int, ...], *, scores_teach: bool) -> None:
        super().__init__()
        self.head, self.scores_teach = head, scores_teach
        width = shape[0]
        self.features = (
            nn.Conv2d(width, width, 3, padding=1, bias=False) if len(shape) > 1 else nn.Linear(width, width, bias=False)
        )

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        def alike(rows: Tensor) -> Tensor:
            centred = rows - rows.mean(1, keepdim=True)
            return nn.functional.cosine_similarity(centred[:, None], centred[None], dim=2)

        prediction = nn.functional.cross_entropy(self.head(outputs if self.scores_teach else outputs.detach()), y)
        features = self.features(outputs)
        features = features.flatten(2).std(2) if features.dim() == 4 else features
        matching = (alike(features) - alike(torch.eye(4)[y])).pow(2).mean()
        return 0.99 * matching + 0.01 * prediction if self.scores_teach else matching + prediction


def loss_of(head: nn.Module | None, outputs: Tensor, y: Tensor) -> Tensor:
    if isinstance(head, PlainSimilarity):
        return head.loss(outputs, y)
    return nn.functional.cross_entropy(outputs if head is None else head(outputs), y)


def train_locally(data: Data, blocks: list[int], epochs: int, **options: Any) -> tuple[nn.Module, list[nn.Module | None]]:
    """What `--method neuroflux` is to give for `conv_layers`, in plain PyTorch.

    Args:
        data: samples and labels.
        blocks: for each unit, its block.
        epochs: of every block.
        **options: of the configuration.
    """
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", **{**OPTIONS, **options, "epochs": epochs})
    split = training_split(data, **{**OPTIONS, **options, "epochs": epochs})
    model = built(conv_layers, config.seed)
    assert isinstance(model, nn.Sequential)
    parts = [model[start:stop] for start, stop in itertools.pairwise(BOUNDS)]
    shapes: list[tuple[int, ...]] = [(16, 8, 8), (24, 4, 4), (384,)]
    heads: list[nn.Module | None] = []
    for unit, shape in enumerate(shapes):
        head = drawn_head(unit, config.seed, shapes)
        is_plain = config.local_loss == "cross-entropy"
        heads.append(head if is_plain else PlainSimilarity(head, shape, scores_teach=config.local_loss == "both"))
    heads.append(None)
    x, y = split.batch(np.arange(len(split)))
    for block in range(max(blocks) + 1):
        own = [unit for unit, place in enumerate(blocks) if place == block]
        parameters = [
            p for unit in own for module in (parts[unit], heads[unit]) if module is not None for p in module.parameters()
        ]
        optimizer = make_optimizer(config, block, parameters)
        for unit in own:
            parts[unit].train()
            (heads[unit] or nn.Identity()).train()
        step = 0
        for epoch in range(epochs):
            word = "samples" if block else "epoch"
            order = permutation_of(len(split), config.seed, word, epoch)
            for begin in range(0, len(order), config.batch_sizes[0]):
                chosen = order[begin : begin + config.batch_sizes[0]]
                torch.manual_seed(seed_of(config.seed, "forward", block, step, 0))
                tensor = x[chosen].clone()
                for unit in own:
                    tensor = parts[unit](tensor)
                    head = heads[unit]
                    loss_of(head, tensor, y[chosen]).backward()  # type: ignore[no-untyped-call]
                    if config.clip_norm is not None:
                        learning = [p for module in (parts[unit], head) if module is not None for p in module.parameters()]
                        nn.utils.clip_grad_norm_(learning, config.clip_norm)
                    tensor = tensor.detach()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
        if block == 0:
            chosen = permutation_of(len(split), config.seed, "own order")
            x, y = x[chosen], y[chosen]
        with torch.no_grad():
            for unit in own:
                parts[unit].eval()
            size = config.batch_sizes[0]
            batches = []
            for begin in range(0, len(x), size):
                tensor = x[begin : begin + size].clone()
                for unit in own:
                    tensor = parts[unit](tensor)
                batches.append(tensor)
            x = torch.cat(batches)
    return model, heads


@pytest.mark.parametrize(("cuts", "blocks"), [(None, [0, 0, 0, 0]), ("2", [0, 0, 1, 1]), ("1,2,3", [0, 1, 2, 3])])
def test_units_learn_as_in_plain_pytorch(cuts: str | None, blocks: list[int], tmp_path: Path) -> None:
    data = images(60)
    cut = {"cuts": cuts} if cuts else {"partitions": 1}
    result = fit(tmp_path / "run", data, **cut)
    expected, heads = train_locally(data, blocks, epochs=2)
    trained = load_file(result.weights_file)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(trained[name], tensor), name
    kept = load_file(tmp_path / "run" / "heads.safetensors")
    for number, head in enumerate(heads):
        for name, tensor in (head.state_dict() if head is not None else {}).items():
            assert torch.equal(kept[head_prefix(number) + name], tensor), name


@pytest.mark.parametrize("local_loss", ["similarity", "both"])
def test_units_learn_which_samples_are_alike_as_in_plain_pytorch(local_loss: str, tmp_path: Path) -> None:
    data = images(60)
    result = fit(tmp_path / "run", data, cuts="2", local_loss=local_loss, optimizer="sgd")
    expected, heads = train_locally(data, [0, 0, 1, 1], epochs=2, local_loss=local_loss, optimizer="sgd")
    trained = load_file(result.weights_file)
    # The plain cosines are summed in another order.
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-3, atol=1e-4)
    kept = load_file(tmp_path / "run" / "heads.safetensors")
    assert heads[1] is not None
    torch.testing.assert_close(
        kept[head_prefix(1) + "features.0.weight"], heads[1].state_dict()["features.weight"], rtol=1e-3, atol=1e-4
    )
    untrained, _ = train_locally(data, [0, 0, 1, 1], epochs=2, optimizer="sgd")
    assert not torch.allclose(trained["0.weight"], untrained.state_dict()["0.weight"], rtol=1e-3, atol=1e-4)


def test_an_exit_of_a_similarity_run_is_its_class_scores_alone(tmp_path: Path) -> None:
    data = images(60)
    result = fit(tmp_path / "run", data, cuts="2", local_loss="both", epochs=1)
    lowmem_pnn.export(result, out=tmp_path / "exit", exit=1)
    exported = torch.export.load(tmp_path / "exit" / "model.pt2")
    assert exported.module()(data[0]).shape == (60, 4)
    assert not any("features" in name for name in exported.state_dict)
    assert result.exits[0]["params"] == sum(tensor.numel() for name, tensor in exported.state_dict.items() if is_parameter(name))


def is_parameter(name: str) -> bool:
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"micro_batch": 8}, "--micro-batch 8 of --batch-size 16: a batch has to go through at once"),
        ({"method": "exact"}, "--local-loss has no effect here: it needs --method neuroflux"),
    ],
)
def test_similarity_is_refused_where_it_cannot_be(options: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=error):
        fit(tmp_path / "run", images(60), local_loss="both", **options)


@pytest.mark.parametrize("step_in_backward", [True, False])
def test_clipping_is_by_layer_whatever_the_blocks(step_in_backward: bool, tmp_path: Path) -> None:
    data = images(60)
    options = {"clip_norm": 0.05, "step_in_backward": step_in_backward}
    whole, cut = (
        load_file(fit(tmp_path / name, data, **options, **own).weights_file)
        for name, own in (("whole", {"partitions": 1}), ("cut", {"cuts": "1,2"}))
    )
    expected = train_locally(data, [0, 0, 0, 0], epochs=2, clip_norm=0.05)[0].state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in expected.items())
    # The first layer of all sees the same samples in the same order, wherever its block ends.
    first = [name for name in whole if name.startswith(("0.", "1."))]
    assert first
    assert all(torch.equal(whole[name], cut[name]) for name in first)
    unclipped = train_locally(data, [0, 0, 0, 0], epochs=2)[0].state_dict()
    assert not torch.equal(unclipped[first[0]], whole[first[0]])


def test_a_block_that_is_trained_does_not_move(tmp_path: Path) -> None:
    data = images(60)
    first = fit(tmp_path / "one", data, cuts="2", epochs=(2, 1))
    second = fit(tmp_path / "two", data, cuts="2", epochs=(2, 4))
    one, two = load_file(first.weights_file), load_file(second.weights_file)
    frozen = [name for name in one if int(name.split(".")[0]) < 7]
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(one[name], two[name]) for name in frozen)
    assert not torch.equal(one["11.weight"], two["11.weight"])


@pytest.mark.parametrize(
    ("visits", "extra", "stops"),
    [
        ("sequential", {}, (2, 12)),
        ("laps=2", {}, (9,)),
        ("interleaved", {"macro_batches": 2}, (5, 12)),
        ("sequential", {"augment": "basic", "views": 2}, (5,)),
    ],
    ids=["sequential", "laps", "interleaved", "augmented"],
)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    visits: str, extra: dict[str, Any], stops: tuple[int, ...], tmp_path: Path
) -> None:
    data = images(80)
    options = {"visits": visits, "cuts": "2", "epochs": 2, "commit_every": 0.0, **extra}
    fit(tmp_path / "whole", data, **options)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for partition in (0, 1):
        assert [line["epoch"] for line in lines if "train_loss" in line and line["partition"] == partition] == [1, 2]
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for stop_after in stops:
        folder = tmp_path / f"stopped{stop_after}"
        _stop(folder, data, stop_after, options)
        fit(folder, data, resume=True, **options)
        assert (folder / "model.safetensors").read_bytes() == whole, stop_after
        assert not (folder / "activations").exists()


def _stop(folder: Path, data: Data, after: int, options: dict[str, Any]) -> None:
    """Begin a run, and break off after some batches, as a crash would."""
    seen = itertools.count(1)

    class Broken(Exception):
        """The crash."""

    class Breaking(lowmem_pnn.reporting.progress.Display):  # type: ignore[misc, name-defined]
        def advance(self, *_: Any) -> None:
            if next(seen) == after:
                raise Broken

    with pytest.raises(Broken):
        fit(folder, data, display=Breaking(), **options)


def test_interleaved_blocks_learn_from_what_the_block_before_has_just_learnt(tmp_path: Path) -> None:
    """With one macro-batch an epoch, and one epoch, it is the sequential method but for the order of samples."""
    data = images(64)
    result = fit(tmp_path / "run", data, visits="interleaved", cuts="2", epochs=1, val_fraction=0.0)
    lines = step_lines(tmp_path / "run")
    assert result.test_accuracy is None
    assert lines == []  # 100 steps a line
    model = loaded(conv_layers, result.weights_file)
    assert torch.isfinite(model(data[0])).all()


def test_interleaved_blocks_with_batches_of_their_own_count_every_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A macro_batch of 16 samples is one step of the first block, and two, of 12 and 4 samples, of the second."""
    mixed, mix = Counter[Any](), BatchMixer.__call__
    monkeypatch.setattr(BatchMixer, "__call__", lambda self, *args: (mixed.update([args[2:]]), mix(self, *args))[1])
    options: dict[str, Any] = {"macro_batches": 1, "batch_size": (16, 12), "lr_schedule": "cosine", "log_every": 1, "epochs": 2}
    options["mixup"] = 0.2
    shown: list[int] = []
    display = Display()
    monkeypatch.setattr(display, "end_epoch", lambda line: shown.append(line["epoch"]))
    fit(tmp_path / "run", images(48), display=display, visits="interleaved", cuts="2", val_fraction=0.0, **options)
    lines = step_lines(tmp_path / "run")
    first, second = ([line["step"] for line in lines if line["visit"] % 3 == number] for number in (0, 2))  # learn, emit, learn
    assert first == list(range(1, 7))
    assert second == list(range(1, 13))
    assert lines[-1]["lr"] < 0.001  # the schedule's end
    epochs = [
        line for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if "train_loss" in line
    ]
    assert [(line["partition"], line["epoch"], "memory" in line) for line in epochs] == [
        (0, 1, False),
        (1, 1, True),
        (0, 2, False),
        (1, 2, True),
    ]
    assert all(line["peak_bytes"] > 0 and line["micro_batch"] > 0 for line in epochs)
    for line in epochs[1::2]:
        assert line["samples_per_second"] > 0
        assert set(line["waiting"]) == {"disk", "copy", "data"}
        assert {partition for _, partition, _ in line["memory"]} == {0, 1}
    assert shown == [line["epoch"] for line in epochs[1::2]]
    # Each batch of an epoch is mixed by draws of its own: three of the first block, six of the second.
    assert mixed == Counter({(("epoch", epoch), batch): 1 + (batch < 3) for epoch in range(2) for batch in range(6)})
    ends = [line for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if "val_loss" in line]
    assert [(line["epoch"], line["partition"]) for line in ends] == [(1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run whose model and data have names, so that its exits can be exported."""
    folder = tmp_path_factory.mktemp("one")
    lines = [
        "from helpers.small_networks import conv_layers, images",
        "def net(num_classes=4): return conv_layers()",
        "def data(): return images(80), images(40, seed=1)",
    ]
    (folder / "mine.py").write_text("\n".join(lines))
    names = f"{folder}/mine.py:net", f"{folder}/mine.py:data"
    return lowmem_pnn.fit(*names, max_gpu_mem="200MB", workdir=folder / "run", **OPTIONS, partitions=2)


def test_exits_are_chosen_without_the_test_data(one: Result, tmp_path: Path) -> None:
    wrong = images(40, seed=1)[0], (images(40, seed=1)[1] + 1) % 4
    two = fit(tmp_path / "two", images(80), test=wrong, partitions=2)
    assert one.test_accuracy != two.test_accuracy
    assert one.chosen_exit == two.chosen_exit
    assert [exit["val_accuracy"] for exit in one.exits] == [exit["val_accuracy"] for exit in two.exits]
    assert one.exits[-1]["test_accuracy"] == one.test_accuracy
    assert all(exit["samples_per_second"] > 0 for exit in one.exits)


def test_exits_are_numbered_as_export_takes_them(one: Result, tmp_path: Path) -> None:
    assert [exit["number"] for exit in one.exits] == [1, 2, 3, 4]
    best = choose_exit([exit["val_accuracy"] for exit in one.exits], 0.01)
    assert one.chosen_exit == best + 1
    assert find_exit(one, "auto", tmp_path) == find_exit(one, one.chosen_exit, tmp_path) == best
    assert f"{one.chosen_exit} chosen" in str(one)
    assert f"{one.exits[0]['params']:,}" in str(one)


def test_exits_without_accuracies_are_not_chosen(tmp_path: Path) -> None:
    x, y = vectors(40)
    result = fit(tmp_path / "numbers", (x, y + 0.5), build=_one_value, epochs=1)
    assert [exit["val_accuracy"] for exit in result.exits] == [None, None, None]
    assert result.chosen_exit is None
    with pytest.raises(
        ConfigError, match="has no accuracies on validation data to choose an exit by; give --exit K, from 1 to 3"
    ):
        lowmem_pnn.export(tmp_path / "numbers", model=_one_value)
    # A partition that is frozen is not measured, and the others' accuracies are theirs.
    result = fit(tmp_path / "frozen", (x, y), build=_mlp, epochs=1, cuts="2", freeze="4.*")
    assert [exit["val_accuracy"] is None for exit in result.exits] == [False, False, True]


def test_an_exported_exit_is_the_runs_exit_bit_for_bit(one: Result, tmp_path: Path) -> None:
    run, x = Path(one.workdir), images(40, seed=1)[0]
    for number in (0, 2, 3):  # heads on both kinds of maps, and the model's own classes
        exit = one.exits[number]
        report = lowmem_pnn.export(run, exit=number + 1, out=tmp_path / f"exit{number}", trust=True)
        exported = torch.export.load(report["program"]).module()
        model = loaded(conv_layers, one.weights_file)
        chain = capture(model, TensorSpec((3, 8, 8), torch.float32))
        expected = x
        with torch.no_grad():
            for layer in chain.eval().layers[: number + 1]:
                (expected,) = layer(expected)
            if number < 3:
                head = drawn_head(number, 0, [(16, 8, 8), (24, 4, 4), (384,)])
                kept = load_file(run / "heads.safetensors")
                prefix = head_prefix(number)
                head.load_state_dict({name.removeprefix(prefix): t for name, t in kept.items() if name.startswith(prefix)})
                expected = head.eval()(expected)
            assert torch.equal(exported(x), expected)
            assert torch.equal(exported(x[:1]), expected[:1]) or torch.allclose(exported(x[:1]), expected[:1], atol=1e-6)
        right = (expected.argmax(1) == images(40, seed=1)[1]).float().mean()
        assert float(right) == pytest.approx(exit["test_accuracy"])
        weights = load_file(report["weights"])
        learnt = sum(t.numel() for name, t in weights.items() if "running" not in name and "num_batches" not in name)
        assert learnt == report["params"] == exit["params"]
    with pytest.raises(ConfigError, match="exits 1 to 4"):
        lowmem_pnn.export(run, exit=5, trust=True)
    for options, asked in (({"to": "hf"}, "--to hf"), ({"merge": True}, "--merge")):
        with pytest.raises(
            ConfigError, match=f"^{asked} writes the whole model, and exit 2 of 4 is a part of it; give --exit 4, or"
        ):
            lowmem_pnn.export(run, exit=2, trust=True, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--merge has no effect here"):
        lowmem_pnn.export(run, exit=4, merge=True, trust=True)


def test_the_learning_rate_follows_a_batch_that_was_chosen(tmp_path: Path) -> None:
    result = fit(tmp_path / "run", vectors(256), build=_mlp, batch_size="auto", log_every=1, optimizer="sgd", val_fraction=0.0)
    batch = result.partitions[0]["batch"]
    assert batch == 256
    assert step_lines(tmp_path / "run")[0]["lr"] == pytest.approx(0.01 * 256 / 64)
    adam = fit(tmp_path / "adam", vectors(256), build=_mlp, batch_size="auto", log_every=1, val_fraction=0.0)
    assert step_lines(tmp_path / "adam")[0]["lr"] == pytest.approx(0.01 * 2)
    assert adam.oom_retries == 0


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))


def _one_value() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "pnn", "heads": "linear"}, "--heads has no effect here: it needs --method neuroflux"),
        ({"recovery_epochs": 1}, "--recovery-epochs has no effect here"),
        ({"visits": "laps=9", "epochs": 3}, "there are 3 epochs; give at most laps=3"),
        ({"visits": "sideways"}, "--visits 'sideways'"),
        ({"views": 2}, "--views has no effect here"),
        ({"macro_batches": 2}, "--macro-batches has no effect here"),
        ({"visits": "interleaved", "epochs": (1, 2)}, "give one number of --epochs"),
        ({"visits": "interleaved", "shuffle": (True, False)}, "give one value of --shuffle"),
        ({"blocks": "alike", "partitions": 2}, "--blocks alike finds the cuts"),
        ({"method": "exact", "batch_size": "auto"}, "--batch-size auto"),
        ({"block_tolerance": 0.2}, "--block-tolerance has no effect here: it needs --blocks alike"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(max_gpu_mem="1GB", model="mlp:12-4", data="digits", **{"method": "neuroflux", **options})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokens_learn_by_units_too(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(random.Random(0).choices(range(97, 105), k=4000)))
    result = lowmem_pnn.fit(
        "gpt:layers=2,width=16,heads=2,context=16", f"text:{tmp_path}/text.txt", max_gpu_mem="100MB", workdir=tmp_path / "run",
        **{**OPTIONS, "epochs": 1},
    )  # fmt: skip
    assert result.perplexity is not None
    assert len(result.exits) > 2
    assert json.loads((tmp_path / "run" / "result.json").read_text())["exits"][0]["params"] > 0
