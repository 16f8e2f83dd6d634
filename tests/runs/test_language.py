"""Runs on language data: the mean over counted tokens, exact whatever the micro-batches, and models that take masks and positions."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowmem_pnn
from helpers.exact_runs import fit
from helpers.language import pairs, write_jsonl, write_tokenizer
from helpers.plainloops import assert_same_weights, built, loaded, step_lines, training_split
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.language.language_form import LanguageForm
from lowmem_pnn.language.open_language import open_language
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.seeds import permutation_of
from lowmem_pnn.sources.subsets import SubsetSplit
from lowmem_pnn.workload.parts import split_data

CONTEXT = 12
OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 6, "lr": 0.01, "seed": 3, "val_fraction": 0.1, "context": CONTEXT}


class Decoder(nn.Module):
    """A causal decoder that takes a mask and positions, and looks at no other document."""

    def __init__(self, vocabulary: int = 256, width: int = 8) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        self.mix, self.norm = nn.Linear(width, 3 * width), nn.LayerNorm(width)
        self.mlp, self.head = nn.Linear(width, width), nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        length = input_ids.shape[1]
        places = torch.arange(length)[None].expand_as(input_ids) if position_ids is None else position_ids
        x = self.tokens(input_ids) + self.places(places)
        allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            allowed = allowed & (attention_mask[:, None, None, :] > 0)
        if position_ids is not None:
            document = (position_ids == 0).cumsum(1)
            allowed = allowed & (document[:, None, :, None] == document[:, None, None, :])
        q, k, v = self.mix(self.norm(x))[:, None].chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, allowed)[:, 0]
        return self.head(x + torch.relu(self.mlp(x)))


class Simple(nn.Module):
    """A model of one input, by no name that data has."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 256))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def data(folder: Path, rows: Any = None) -> str:
    return f"jsonl:{write_jsonl(folder / 'a.jsonl', rows or pairs(20))}"


def plain(
    build: Any,
    spec: str,
    folder: Path,
    *,
    named: bool = True,
    packs: bool = False,
    micro_batch: int | None = None,
    **options: Any,
) -> nn.Module:
    """The loop that people write: the sum over a batch's labels that count, divided by their number."""
    config = configure(max_gpu_mem="1GB", model="python:model", data=spec, method="exact", **{**OPTIONS, **options})
    dataset = open_language(spec, LanguageForm(None, CONTEXT, packs, "completions", folder / "plain"))
    train = split_data(dataset, config)[1]["train"]
    assert dataset.structure is not None
    model = built(build, config.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr[0], weight_decay=0.0, fused=True)
    for epoch in range(config.epochs[0]):
        order = permutation_of(len(train), config.seed, "epoch", epoch)
        for begin in range(0, len(order), config.batch_sizes[0]):
            x, y = train.batch(order[begin : begin + config.batch_sizes[0]])
            size, count = micro_batch or len(y), int((y != -100).sum())
            for start in range(0, len(y), size):
                part = tuple(tensor[start : start + size].clone() for tensor in x)
                scores = model(**dataset.structure.unflatten(part)) if named else model(part[0])  # type: ignore[arg-type]
                labels = y[start : start + size].flatten()
                own = int((labels != -100).sum())
                loss = nn.functional.cross_entropy(scores.flatten(0, 1), labels)
                (loss if own == count else loss * (own / count)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("micro_batch", [6, 4])
@pytest.mark.parametrize("options", [{"method": "exact"}, {"method": "exact", "cuts": "1,2,4"}, {"method": "backprop"}])
def test_padded_rows_are_same_as_plain_pytorch(options: dict[str, Any], micro_batch: int, tmp_path: Path) -> None:
    spec = data(tmp_path)
    result = fit(Decoder, spec, tmp_path / "run", micro_batch=micro_batch, data_root=tmp_path / "root", **options, **OPTIONS)
    expected = plain(Decoder, spec, tmp_path, micro_batch=micro_batch)
    assert_same_weights(loaded(Decoder, result.weights_file), expected)


@pytest.mark.parametrize("method", ["exact", "backprop"])
def test_micro_batches_add_up_to_one_large_batch(method: str, tmp_path: Path) -> None:
    # Adam's steps have the size of the rate even where a gradient is rounding alone; sgd shows the sums themselves.
    spec, options = data(tmp_path), {**OPTIONS, "log_every": 1}
    runs = [
        fit(
            Decoder,
            spec,
            tmp_path / str(size),
            method=method,
            micro_batch=size,
            data_root=tmp_path / "root",
            optimizer="sgd",
            **options,
        )
        for size in (6, 1)
    ]
    losses = [[line["loss"] for line in step_lines(tmp_path / str(size))] for size in (6, 1)]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, other = (loaded(Decoder, run.weights_file).state_dict() for run in runs)
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=2e-6) for name in one)


def test_packed_rows_are_same_as_plain_pytorch(tmp_path: Path) -> None:
    spec = data(tmp_path)
    options = {**OPTIONS, "batch_size": 4}
    result = fit(Decoder, spec, tmp_path / "run", pack=True, data_root=tmp_path / "root", cuts="2", **options)
    assert_same_weights(loaded(Decoder, result.weights_file), plain(Decoder, spec, tmp_path, packs=True, batch_size=4))


def test_a_packed_document_has_the_loss_that_it_has_alone(tmp_path: Path) -> None:
    model = built(Decoder, 0).eval().requires_grad_(False)
    spec, losses, sizes = data(tmp_path, [{"prompt": "ab", "completion": "cde"[: 1 + n % 3]} for n in range(10)]), [], []
    for packs in (False, True):
        dataset = open_language(spec, LanguageForm(None, CONTEXT, packs, "completions", tmp_path / "root"))
        sizes.append(len(dataset.train))
        x, y = dataset.train.batch(range(len(dataset.train)))
        scores = model(**dataset.structure.unflatten(x))  # type: ignore[union-attr, arg-type]
        losses.append(float(nn.functional.cross_entropy(scores.flatten(0, 1), y.flatten())))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert sizes == [10, 3]


def test_a_model_of_one_input_gets_the_tokens(tmp_path: Path) -> None:
    spec = data(tmp_path)
    result = fit(Simple, spec, tmp_path / "run", data_root=tmp_path / "root", cuts="2", **OPTIONS)
    assert_same_weights(loaded(Simple, result.weights_file), plain(Simple, spec, tmp_path, named=False))
    with pytest.raises(ConfigError, match=r"--pack keeps documents in a row apart by position_ids, and model .* takes none"):
        fit(Simple, spec, tmp_path / "other", data_root=tmp_path / "root", pack=True, **OPTIONS)


def test_neuroflux_weighs_by_what_counts(tmp_path: Path) -> None:
    spec = data(tmp_path)
    runs = [
        fit(
            Simple,
            spec,
            tmp_path / str(size),
            method="neuroflux",
            micro_batch=size,
            data_root=tmp_path / "root",
            optimizer="sgd",
            **OPTIONS,
        )
        for size in (6, 2)
    ]
    one, other = (loaded(Simple, run.weights_file).state_dict() for run in runs)
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=2e-6) for name in one)


def test_loss_and_perplexity_are_over_counted_tokens(tmp_path: Path) -> None:
    spec = data(tmp_path)
    result = fit(Decoder, spec, tmp_path / "run", data_root=tmp_path / "root", test_fraction=0.3, **OPTIONS)
    config = configure(max_gpu_mem="1GB", model="python:model", data=spec, method="exact", test_fraction=0.3, **OPTIONS)
    dataset = open_language(spec, LanguageForm(None, CONTEXT, False, "completions", tmp_path / "root"))
    test = split_data(dataset, config)[1]["test"]
    (ids, mask), y = test.batch(range(len(test)))
    scores = loaded(Decoder, result.weights_file)(ids, mask).detach()
    expected = float(nn.functional.cross_entropy(scores.flatten(0, 1), y.flatten()))
    assert result.test_loss == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.preparation["tokenizer"] == "bytes"


class Told(Display):
    """What a run says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def _order_of(size: int) -> np.ndarray:
    """The rows of a first epoch, as the data numbers them."""
    split = training_split((torch.zeros(size, 1), torch.zeros(size, dtype=torch.int64)), val_fraction=0)
    assert isinstance(split, SubsetSplit)
    return split.numbers[permutation_of(size, 0, "epoch", 0)]


@pytest.mark.parametrize("method", ["exact", "backprop", "neuroflux"])
def test_a_batch_without_a_label_that_counts_takes_no_step(method: str, tmp_path: Path) -> None:
    x = np.random.RandomState(0).randint(0, 256, (12, CONTEXT))
    y, order = np.roll(x, -1, 1), _order_of(12)
    y[order[4:8]] = -100
    options: dict[str, Any] = {"epochs": 1, "batch_size": 4, "lr": 0.01, "val_fraction": 0, "method": method}
    display, folder = Told(), tmp_path / "run"
    result = fit(Simple, (x, y), folder, display=display, weight_decay=0.5, log_every=1, **options)
    assert sum("a batch has no label that counts: it is left out, without a step" in text for text in display.texts) == 1
    assert [line["loss"] is None for line in step_lines(folder) if line["step"] <= 3][:3] == [False, True, False]
    if method != "neuroflux":
        model = built(Simple, 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5, fused=True)
        for part in (order[:4], order[8:]):
            scores = model(torch.from_numpy(x[part]))
            nn.functional.cross_entropy(scores.flatten(0, 1), torch.from_numpy(y[part]).flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same_weights(loaded(Simple, result.weights_file), model)
    y[:] = -100
    with pytest.raises(DataError, match=r"and a label that counts; give more samples, or labels"):
        fit(Simple, (x, y), tmp_path / "c", **options)


def test_a_tokenizer_of_ones_own_and_a_gpt(tmp_path: Path) -> None:
    tokenizer, display = write_tokenizer(tmp_path / "t"), Told()
    spec, model = data(tmp_path), "gpt:layers=1,width=8,heads=2,context=16"
    result = lowmem_pnn.fit(
        model, spec, max_gpu_mem="200MB", device="cpu", method="exact", epochs=1, tokenizer=tokenizer, workdir=tmp_path / "run",
        data_root=tmp_path / "root", test_fraction=0.2, display=display,
    )  # fmt: skip
    assert result.perplexity is not None
    assert any(text.startswith("tokenised jsonl:") for text in display.texts)
    assert any("20 documents, " in text and "279 tokens" in text and text.startswith("samples: ") for text in display.texts)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (stored["tokenizer"], stored["loss_on"], stored["pack"]) == (str(tokenizer), "completions", False)
    scores = lowmem_pnn.evaluate(tmp_path / "run")
    assert scores["test_loss"] == pytest.approx(result.test_loss)


def test_validation_data_of_another_form_is_refused(tmp_path: Path) -> None:
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "b.bin")
    common = {
        "val_data": f"tokens:{tmp_path / 'b.bin'}",
        "data_root": tmp_path / "root",
        "epochs": 1,
        "batch_size": 4,
        "context": CONTEXT,
    }
    with pytest.raises(
        DataError, match=r"has samples of other tensors than the training data has .one tensor, and input_ids and att"
    ):
        fit(Decoder, data(tmp_path), tmp_path / "run", **common)


def test_a_context_or_a_vocabulary_beyond_the_models(tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "data_root": tmp_path / "root",
        "epochs": 1,
        "batch_size": 4,
        "method": "exact",
        "max_gpu_mem": "100MB",
    }
    run = functools.partial(lowmem_pnn.fit, workdir=tmp_path / "run", device="cpu", **common)
    with pytest.raises(
        ConfigError, match=r"takes up to 8 tokens .*, and the samples of data a are .16,. int64; give --context 8 at most"
    ):
        run("gpt:layers=1,width=8,heads=2,context=8", data(tmp_path), context=16)
    with pytest.raises(
        ConfigError,
        match=r"gives outputs of shape \(batch, 12, 256\), and data a has 279 classes; it should give",
    ):
        run(Decoder, data(tmp_path), context=12, tokenizer=write_tokenizer(tmp_path / "t"))
