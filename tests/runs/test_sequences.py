"""Runs on whole texts: sources with targets for models that read one and write the other, and texts with a class for each."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem_pnn
from helpers.commands import lowmem_pnn as command
from helpers.exact_runs import fit
from helpers.language import TEXT, pairs, write_jsonl, write_tokenizer
from helpers.plainloops import step_lines
from helpers.transformers_folders import BART, BERT, LLAMA, T5, make_model, of_folder
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.inference import ways_to_generate
from lowmem_pnn.language.language_form import Head, LanguageForm
from lowmem_pnn.language.open_language import open_language
from lowmem_pnn.language.prompts import prompt_tokens
from lowmem_pnn.language.tokenizer import open_tokenizer
from lowmem_pnn.seeds import permutation_of
from lowmem_pnn.sources.splits import Split
from lowmem_pnn.workload.parts import split_data

OPTIONS: dict[str, Any] = {"batch_size": 8, "seed": 3, "context": 16, "val_fraction": 0, "test_fraction": 0.2, "lr": 0.01}


def write_model(folder: Path, kind: str, auto: str, sizes: dict[str, Any], **options: Any) -> Path:
    make_model(kind, auto, sizes).save_pretrained(folder)
    return write_tokenizer(folder, **options)


def parts(spec: str, form: LanguageForm) -> dict[Any, Split]:
    config = configure(max_gpu_mem="1GB", model="python:model", data=spec, **OPTIONS)
    return split_data(open_language(spec, form), config)[1]


def batches(train: Split, epochs: int) -> Any:
    for epoch in range(epochs):
        order = permutation_of(len(train), OPTIONS["seed"], "epoch", epoch)
        for begin in range(0, len(order), OPTIONS["batch_size"]):
            yield train.batch(order[begin : begin + OPTIONS["batch_size"]])


def assert_same(one: nn.Module, other: nn.Module) -> None:
    expected = other.state_dict()
    differing = [name for name, tensor in one.state_dict().items() if not torch.equal(tensor, expected[name])]
    assert not differing


@pytest.mark.parametrize(("kind", "sizes", "start", "cuts"), [("t5", T5, 1, "1,2"), ("bart", BART, 0, None)])
def test_a_model_that_writes_is_trained_as_by_its_own_loss(
    kind: str, sizes: dict[str, Any], start: int, cuts: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = "AutoModelForSeq2SeqLM"
    folder = write_model(tmp_path / "model", kind, auto, sizes, begins=kind == "bart")
    rows = [{"source": row["prompt"], "target": row["completion"]} for row in pairs(30)]
    spec = f"jsonl:{write_jsonl(tmp_path / 'a.jsonl', rows)}"
    result = fit(
        f"hf:{folder}", spec, tmp_path / "run", epochs=2, cuts=cuts, target_context=12, data_root=tmp_path, weight_decay=0.0,
        lr_schedule="constant", clip_norm=0, log_every=1, **OPTIONS,
    )  # fmt: skip
    head = Head("sequences", padding=1, start=start, target_context=12)
    split = parts(spec, LanguageForm(str(folder), 16, False, "completions", tmp_path / "tokens", head))
    model = of_folder(folder, auto).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0, fused=True)
    losses = []
    for (ids, mask, _), labels in batches(split["train"], 2):
        # Its cache, which training has no use for, rounds otherwise.
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert [line["loss"] for line in step_lines(tmp_path / "run")] == losses
    trained = of_folder(tmp_path / "run" / "hf", auto)
    assert_same(trained, model)
    (ids, mask, _), labels = split["test"].batch(range(len(split["test"])))
    with torch.no_grad():
        loss = trained(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert result.test_loss == pytest.approx(float(loss), rel=1e-5)
    assert lowmem_pnn.evaluate(result)["test_loss"] == result.test_loss
    # What it writes, with keys and values kept and by whole forwards.
    reader, sources = open_tokenizer(str(folder)), ["the cat", "a dog sat on the log. a cat and a dog. the cat sat on the mat"]
    expected = [reader.decode(plain_target(trained, prompt_tokens(reader, source, 16), start, 12)) for source in sources]
    assert lowmem_pnn.generate(result, sources, max_new_tokens=40) == expected
    monkeypatch.setattr(ways_to_generate, "why_not_cached", lambda *given: "it is not to be")
    assert lowmem_pnn.generate(result, sources[1], max_new_tokens=40) == expected[1]


def plain_target(model: Any, source: list[int], start: int, most: int) -> list[int]:
    """The loop that people write; token 0 ends a text."""
    written = [start]
    while len(written) <= most:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([written]), use_cache=False).logits
        if (token := int(logits[0, -1].argmax())) == 0:
            break
        written.append(token)
    return written[1:]


def test_sources_and_targets_are_rows_as_the_tokenizer_wraps_them(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "t", begins=True)
    spec = f"jsonl:{write_jsonl(tmp_path / 'a.jsonl', [{'prompt': 'the cat', 'completion': 'a'}, {'prompt': TEXT, 'completion': 'dog'}])}"
    head = Head("sequences", padding=1, start=5, target_context=4)
    dataset = open_language(spec, LanguageForm(str(tokenizer), 6, False, "completions", tmp_path / "root", head))
    (ids, mask, moved), labels = dataset.train.batch([0, 1])
    cat, letter, dog = (found.tolist() for found in open_tokenizer(str(tokenizer)).encode(["the cat", "a", "dog"]))
    assert ids[0].tolist() == ([2, *cat] + [1] * 6)[:6]
    assert mask[0].tolist() == [1] * (1 + len(cat)) + [0] * (5 - len(cat))
    assert mask[1].tolist() == [1] * 6
    assert labels.tolist() == [([2, *one, 0] + [-100] * 4)[:4] for one in (letter, dog)]
    assert moved.tolist() == [([5, 2, *one, 0] + [1] * 4)[:4] for one in (letter, dog)]
    assert "1 longer than a row, and cut" in dataset.preprocessing
    assert "a source a row of 6, its target one of 4" in dataset.preprocessing


LABELS = ["sad", "glad", "so-so"]


def labelled(numbers: bool, count: int = 30) -> list[dict[str, Any]]:
    words = TEXT.split()
    return [{"text": " ".join(words[n : n + 1 + n % 5]), "label": n % 3 if numbers else LABELS[n % 3]} for n in range(count)]


@pytest.mark.parametrize(("kind", "sizes"), [("bert", BERT), ("llama", LLAMA)])
def test_texts_are_classified_as_by_the_models_own_loss(kind: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    auto = "AutoModelForSequenceClassification"
    folder = write_model(tmp_path / "model", kind, auto, {**sizes, "num_labels": 3})
    spec = f"jsonl:{write_jsonl(tmp_path / 'a.jsonl', labelled(numbers=False))}"
    result = fit(
        f"hf:{folder}", spec, tmp_path / "run", epochs=2, cuts="2", data_root=tmp_path, weight_decay=0.0, lr_schedule="constant",
        clip_norm=0, log_every=1, **OPTIONS,
    )  # fmt: skip
    split = parts(spec, LanguageForm(str(folder), 16, False, "completions", tmp_path / "tokens", Head("classes", padding=1)))
    model = of_folder(folder, auto).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0, fused=True)
    losses = []
    for (ids, mask), labels in batches(split["train"], 2):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert [line["loss"] for line in step_lines(tmp_path / "run")] == losses
    trained = of_folder(tmp_path / "run" / "hf", auto)
    assert_same(trained, model)
    assert trained.config.id2label == {0: "glad", 1: "sad", 2: "so-so"}
    # Other texts have the same numbers of classes, and need not have any.
    other = write_jsonl(tmp_path / "b.jsonl", [{"text": "the cat", "label": "so-so"}, {"text": "a dog sat", "label": "sad"}])
    scores = lowmem_pnn.evaluate(result, data=f"jsonl:{other}")
    # A text of no token has its row too: else answers would stand beside others.
    texts = [{"text": text} for text in ("the cat", "", "a dog sat")]
    answers = lowmem_pnn.predict(result, str(write_jsonl(tmp_path / "c.jsonl", texts)))
    predicted = torch.as_tensor(answers["scores"])[[0, 2]]
    loss = nn.functional.cross_entropy(predicted, torch.tensor([2, 1]))
    assert scores["test_loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for what it gives up
@pytest.mark.parametrize(
    ("auto", "lora"),
    [("AutoModelForMaskedLM", "r=2,targets=query+value"), ("AutoModelForSequenceClassification", "r=2")],
    ids=["a new head", "the weights' own head"],
)
def test_an_adapter_of_a_model_with_classes_is_loaded_by_peft(auto: str, lora: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    sizes = {**BERT, "max_position_embeddings": 40, "num_labels": 3}
    folder = write_model(tmp_path / "model", "roberta", auto, sizes, pad_token="<pad>")
    spec = f"jsonl:{write_jsonl(tmp_path / 'a.jsonl', labelled(numbers=True))}"
    options = {**OPTIONS, "task": "sequence-classification", "lora": lora, "data_root": tmp_path}
    result = fit(f"hf:{folder}", spec, tmp_path / "run", epochs=1, max_steps=2, **options)
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(result.adapter, num_labels=3).eval()
    ids = torch.arange(3, 15).view(1, 12)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, lowmem_pnn.load(result)(ids))


class Bag(nn.Module):
    """The mean of the embeddings of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(256, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[..., None].float()
        return self.head((self.tokens(input_ids) * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize("source", ["jsonl", "parquet", "hfdata"])
def test_numbers_of_classes_for_a_model_of_ones_own(source: str, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "mood": row["label"]} for row in labelled(numbers=True)]
    columns = {name: [row[name] for row in rows] for name in ("text", "mood")}
    if source == "hfdata":
        import datasets

        features = datasets.Features({"text": datasets.Value("string"), "mood": datasets.ClassLabel(names=LABELS)})
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "hfdata")
    elif source == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), tmp_path / "parquet")
    else:
        write_jsonl(tmp_path / "jsonl", rows)
    result = fit(
        Bag,
        f"{source}:{tmp_path / source}",
        tmp_path / "run",
        target="mood",
        tokenizer="bytes",
        data_root=tmp_path,
        epochs=1,
        **OPTIONS,
    )
    assert result.preparation["target"] == "mood"
    assert result.preparation["classes"] == (LABELS if source == "hfdata" else [])
    assert result.test_accuracy is not None
    assert lowmem_pnn.evaluate(result, model=Bag)["test_loss"] == result.test_loss


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        ([{"text": "a"}], {}, "has the columns 'text', and lacks 'label'; text is taken from text and label: name them so, or give --target"),
        ([{"text": "a", "label": 1.5}], {}, "line 1: 'label' is 1.5; give the name of a class, or its number from 0"),
        ([{"text": "a", "label": -1}], {}, "line 1: 'label' is -1; give the name"),
        ([{"text": "a", "label": 1}, {"text": "a", "label": "b"}], {}, "'label' holds names and numbers of classes; give one of the two"),
        ([{"text": 1, "label": 1}], {}, "line 1: 'text' is a number; give text"),
        (labelled(numbers=False), {"pack": True}, "--pack has no effect here: what is learnt of data jsonl:.* is the class of a text"),
        (labelled(numbers=False), {"target_context": 3}, "--target-context has no effect here: data .* is text; leave it out"),
        (labelled(numbers=False), {"target": "label,text"}, "--target label,text names several columns; give one"),
    ],
)  # fmt: skip
def test_labels_that_do_not_do_are_said_in_a_line(rows: Any, options: dict[str, Any], text: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "bert", "AutoModelForSequenceClassification", {**BERT, "num_labels": 3})
    spec = f"jsonl:{write_jsonl(tmp_path / 'a.jsonl', rows)}"
    with pytest.raises((ConfigError, DataError), match=text):
        lowmem_pnn.plan(f"hf:{folder}", spec, max_gpu_mem="400MB", data_root=tmp_path, **OPTIONS, **options)


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        ([{"source": "a"}], "", "has the columns 'source', and lacks 'target'; text is taken from source and target, or prompt and completion"),
        ([{"messages": []}], "", "has the columns 'messages'; text is taken from source and target, or prompt and completion"),
        ([{"source": "a", "target": None}], "", "line 1: 'target' is a null; give text"),
        ([{"source": "a", "target": "b"}] * 4, "--loss-on all", "--loss-on all has no effect here: what is learnt of data .* is targets alone"),
        ([{"source": "a", "target": "b"}] * 4, "--target-context 64", "--target-context 64: model hf:.* has positions for 32 tokens; give 32"),
        ([{"source": "a", "target": "b"}] * 4, "--target target", "--target has no effect here: data .* is text; leave it out"),
    ],
)  # fmt: skip
def test_pairs_that_do_not_do_are_said_in_a_line(rows: Any, options: str, text: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "bart", "AutoModelForSeq2SeqLM", BART)
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    outcome = command(
        f"plan --max-gpu-mem 400MB --device cpu --no-timing --model hf:{folder} --data jsonl:{data} --data-root {tmp_path} {options}"
    )
    assert outcome.code == 3
    assert re.search(text, outcome.fault), outcome.fault
