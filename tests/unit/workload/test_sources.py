"""Sources of a run's data: text whole or divided, classes by a model's own numbers, and options that have no effect."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.datasets import everything
from helpers.language import write_jsonl, write_tokenizer
from helpers.transformers_folders import BERT, LLAMA, write_config
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.sources.targets import TargetOptions
from lowmem_pnn.workload.inputs import open_data
from lowmem_pnn.workload.sources import SampleForm, open_source
from lowmem_pnn.zoo.models import find_model

TEXT = "to be or not to be, that is the question. " * 9
GPT = "gpt:layers=1,width=8,heads=1,context=8"


def config(data: str, model: str, folder: Path, **options: Any) -> Any:
    return configure(max_gpu_mem="100MB", model=model, data=data, device="cpu", method="exact", data_root=folder, **options)


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_files_of_text_that_are_given_apart_count_whole(own_tokenizer: bool, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.txt" for name in ("train", "valid", "test")}
    for number, file in enumerate(files.values()):
        file.write_text(TEXT * (3 - number))
    options = {"tokenizer": write_tokenizer(tmp_path / "t")} if own_tokenizer else {}
    spec, val, test = (f"text:{file}" for file in files.values())

    def sizes(**given: Any) -> dict[str, int]:
        return {name: len(part) for name, part in open_data(config(spec, GPT, tmp_path, **options, **given))[2].items()}

    whole = sizes(val_data=val, test_data=test)
    cut = sizes(val_data=val)
    assert cut["train"] + cut["test"] == whole["train"]
    assert cut["val"] == whole["val"]
    assert whole["train"] >= 3 * whole["test"] >= 3
    if not own_tokenizer:
        assert whole == {"train": (3 * len(TEXT) - 1) // 8, "val": (2 * len(TEXT) - 1) // 8, "test": (len(TEXT) - 1) // 8}


def test_classes_have_the_numbers_of_the_head_that_was_trained_on_them(tmp_path: Path) -> None:
    names = {"0": "Positive", "1": "negative", "2": "neutral"}
    model = f"hf:{write_config(tmp_path / 'c.json', 'bert', 'BertForSequenceClassification', BERT, id2label=names)}"
    labels = ["neutral", "positive", "negative", "positive"]
    spec = f"jsonl:{write_jsonl(tmp_path / 'a.jsonl', [{'text': name, 'label': name} for name in labels])}"
    asked = config(spec, model, tmp_path, tokenizer="bytes", context=16)
    form = SampleForm.of(find_model(model, {}, None), TargetOptions())
    dataset = open_source(spec, asked, form)
    assert dataset.classes == tuple(dataset.preparation["classes"]) == ("positive", "negative", "neutral")
    assert everything(dataset.train)[1].tolist() == [2, 0, 1, 0]
    plain = open_source(spec, asked, dataclasses.replace(form, classes=("LABEL_0", "LABEL_1", "LABEL_2")))
    assert (plain.classes, plain.fingerprint != dataset.fingerprint) == (("negative", "neutral", "positive"), True)
    # Other data is numbered as the training data was.
    other = f"jsonl:{write_jsonl(tmp_path / 'b.jsonl', [{'text': 'a', 'label': 'neutral'}, {'text': 'b', 'label': 'positive'}])}"
    assert everything(open_source(other, asked, form, dataset.preparation).train)[1].tolist() == [2, 0]


def test_a_decoder_without_padding_is_told_how_to_classify(tmp_path: Path) -> None:
    sizes = {name: value for name, value in LLAMA.items() if name != "pad_token_id"}
    model = f"hf:{write_config(tmp_path / 'c.json', 'llama', None, sizes)}"
    spec = f"jsonl:{write_jsonl(tmp_path / 'a.jsonl', [{'text': 'a', 'label': n % 2} for n in range(8)])}"
    options: dict[str, Any] = {"tokenizer": write_tokenizer(tmp_path / "t"), "task": "sequence-classification"}
    with pytest.raises(ConfigError, match=r"its configuration has none; give --model-arg pad_token_id=1, the tokenizer's$"):
        open_data(config(spec, model, tmp_path, **options))
    assert open_data(config(spec, model, tmp_path, model_arg={"pad_token_id": 1}, **options))[1].num_classes == 2


@pytest.mark.parametrize(
    ("options", "name"), [({"pack": True}, "--pack"), ({"context": 8}, "--context"), ({"loss_on": "all"}, "--loss-on")]
)
def test_options_of_text_have_no_effect_on_images_and_tables(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    for kind in ("parquet", "hfdata"):
        with pytest.raises(
            ConfigError,
            match=rf"^{name} has no effect here: data '{kind}:.*' is text only with a --tokenizer; give one, or leave",
        ):
            open_data(config(f"{kind}:{tmp_path}/a", "resnet18", tmp_path, target="label", **options))


def test_other_data_is_tokenised_on_a_machine_without_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").write_text("")
    spec = f"jsonl:{write_jsonl(tmp_path / 'a.jsonl', [{'text': 'the cat'}])}"
    asked = config(spec, GPT, tmp_path / "file" / "scratch")
    dataset = open_source(spec, asked, SampleForm("any", 8, TargetOptions()), {"tokenizer": "bytes"})
    assert torch.equal(dataset.train.batch([0])[0][0][0, :3], torch.tensor([*b"the"]))
    assert [*tmp_path.glob("lowmem-pnn-tokens-*/tokens-*")]
