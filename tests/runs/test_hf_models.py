"""Runs of transformers' models: from their folder, as plain PyTorch and transformers' own trainer have it, and back to a folder."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowmem_pnn
from helpers.commands import lowmem_pnn as command
from helpers.exact_runs import fit
from helpers.language import pairs, write_jsonl, write_tokenizer
from helpers.plainloops import step_lines
from helpers.transformers_folders import BERT, LLAMA, VIT, make_model, of_folder, write_config, write_llama
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.language.language_form import LanguageForm
from lowmem_pnn.language.open_language import open_language
from lowmem_pnn.language.tokenizer import open_tokenizer
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.run import Run
from lowmem_pnn.seeds import permutation_of
from lowmem_pnn.sources.splits import Split

OPTIONS: dict[str, Any] = {"batch_size": 8, "seed": 3, "context": 16, "val_fraction": 0, "test_fraction": 0.2}
SGD: dict[str, Any] = {"optimizer": "sgd", "momentum": 0, "lr": 0.3, "lr_schedule": "constant", "clip_norm": 0, "log_every": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in shards, prompts with completions, and what a run of it leaves."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder / "model", shard="20KB", num_hidden_layers=1)
    write_jsonl(folder / "a.jsonl", pairs(50))
    return folder


def run_of(root: Path, folder: Path, model: str = "model", **options: Any) -> Result:
    return fit(f"hf:{root / model}", f"jsonl:{root / 'a.jsonl'}", folder, data_root=root, **{**OPTIONS, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(root: Path) -> Result:
    return run_of(root, root / "run", epochs=2, micro_batch=2, **SGD)


def batches(root: Path, result: Result) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, masks and labels of the batches that a run saw, in its order."""
    train = parts(root)["train"]
    count, found = len(train), []
    for epoch in range(result.epochs[0]):
        order = permutation_of(count, OPTIONS["seed"], "epoch", epoch)
        for start in range(0, count, OPTIONS["batch_size"]):
            (ids, mask), labels = train.batch(order[start : start + OPTIONS["batch_size"]])
            found.append((ids, mask, labels))
    return found


def parts(root: Path) -> dict[Any, Split]:
    from lowmem_pnn.config.configure import configure
    from lowmem_pnn.workload.parts import split_data

    config = configure(
        max_gpu_mem="1GB", model=f"hf:{root / 'model'}", data=f"jsonl:{root / 'a.jsonl'}", data_root=root, **OPTIONS
    )
    form = LanguageForm(str(root / "model"), 16, False, "completions", root / "tokens")
    return split_data(open_language(config.data, form), config)[1]


def assert_close(one: nn.Module, other: nn.Module, atol: float = 1e-5) -> None:
    expected = other.state_dict()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=atol, msg=name)


def test_training_is_same_as_by_transformers_trainer(root: Path, trained: Result, tmp_path: Path) -> None:
    """10 steps of SGD, rows of unlike lengths, batches of 8 in parts of 2."""
    import transformers

    rows = []
    for ids, mask, labels in batches(root, trained):
        # Theirs are labels of the same place, which the model moves by one.
        last = torch.where(labels[:, -1:] == -100, torch.ones_like(labels[:, -1:]), labels[:, -1:])
        seen = (labels[:, -1:] != -100).long()
        whole = torch.cat([ids, last], 1), torch.cat([mask, seen], 1), torch.cat([torch.full_like(last, -100), labels], 1)
        rows += [dict(zip(("input_ids", "attention_mask", "labels"), row, strict=True)) for row in zip(*whole, strict=True)]
    losses: list[float] = []

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)  # type: ignore[arg-type]

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=1, optim="sgd",
        learning_rate=0.3, lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = InOrder(of_folder(root / "model"), arguments, train_dataset=rows)
    trainer.train()
    ours = [line["loss"] for line in step_lines(root / "run")]
    theirs = torch.tensor(losses).view(-1, 4).sum(1).tolist()
    assert len(ours) == 10
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert_close(of_folder(Path(str(trained.transformers_folder))), trainer.model.eval())


def test_the_folder_has_the_reported_loss_and_all_that_belongs_to_a_model(root: Path, trained: Result) -> None:
    folder = Path(str(trained.transformers_folder))
    model = of_folder(folder)
    test = parts(root)["test"]
    (ids, mask), labels = test.batch(range(len(test)))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert float(loss) == pytest.approx(trained.test_loss, rel=1e-5)
    assert (folder / "tokenizer.json").read_bytes() == (root / "model" / "tokenizer.json").read_bytes()
    assert {"generation_config.json", "tokenizer_config.json"} < {file.name for file in folder.iterdir()}
    card = (folder / "README.md").read_text()
    assert "# model, fine-tuned" in card
    assert f"test loss {trained.test_loss:.4f}" in card
    assert str(root) not in card
    assert (folder / "model.safetensors").samefile(trained.weights_file)
    assert str(trained.transformers_folder) in str(trained)
    assert not [*(root / "run").glob("scratch.*")]


def test_what_comes_after_training_does_without_the_folder_that_it_began_with(
    root: Path, trained: Result, tmp_path: Path
) -> None:
    shutil.copytree(root / "run", tmp_path / "run")
    (root / "model").rename(root / "away")
    try:
        loaded = lowmem_pnn.load(tmp_path / "run")
        assert lowmem_pnn.evaluate(tmp_path / "run")["test_loss"] == trained.test_loss
        answers = lowmem_pnn.predict(tmp_path / "run")
        report = lowmem_pnn.export(tmp_path / "run", to="hf", out=tmp_path / "out")
    finally:
        (root / "away").rename(root / "model")
    test = parts(root)["test"]
    (ids, _), _ = test.batch(range(len(test)))
    with torch.no_grad():
        expected = loaded(ids)
    torch.testing.assert_close(torch.as_tensor(answers["scores"]), expected, rtol=0, atol=1e-5)
    assert report == {"file": str(tmp_path / "out" / "model.safetensors"), "largest_difference": 0.0}
    assert_close(of_folder(tmp_path / "out"), of_folder(root / "run" / "hf"), atol=0)
    with pytest.raises(ConfigError, match="out is there, and nothing is replaced; give another --out"):
        lowmem_pnn.export(tmp_path / "run", to="hf", out=tmp_path / "out")


def test_an_export_is_in_shards_where_it_is_large(trained: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_pnn.exporting.transformers_folder.SHARD_BYTES", 20_000)
    outcome = command(f"export {trained.workdir} --to hf --out {tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"file: {tmp_path / 'out' / 'model.safetensors.index.json'}")
    assert len([*(tmp_path / "out").glob("model-*-of-*.safetensors")]) > 1
    assert_close(of_folder(tmp_path / "out"), of_folder(Path(str(trained.transformers_folder))), atol=0)


def test_tied_weights_in_bf16_are_trained_in_float32(root: Path, tmp_path: Path) -> None:
    write_llama(tmp_path / "tied", dtype=torch.bfloat16, tie_word_embeddings=True, num_hidden_layers=1)
    result = run_of(root, tmp_path / "run", str(tmp_path / "tied"), epochs=1, lr=1e-30, max_steps=1)
    assert result.weights["cast"] == result.weights["loaded"] == 11
    assert (result.training["lr_schedule"], result.training["clip_norm"], result.method) == ("linear", 1.0, "exact")
    assert_close(of_folder(tmp_path / "run" / "hf"), of_folder(tmp_path / "tied").float(), atol=0)
    assert of_folder(tmp_path / "run" / "hf").lm_head.weight.dtype == torch.float32


def test_a_run_that_ends_before_it_is_done_writes_the_same_folder(
    root: Path, trained: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = Run.end

    def fail(run: Run, stage: Any, *args: Any) -> None:
        assert stage != "done", "pulled the plug"
        end(run, stage, *args)

    monkeypatch.setattr(Run, "end", fail)
    with pytest.raises(AssertionError, match="pulled the plug"):
        run_of(root, tmp_path / "run", epochs=2, micro_batch=2, **SGD)
    (tmp_path / "run" / "hf" / "left").write_text("of the attempt before")
    monkeypatch.undo()
    result = lowmem_pnn.fit(
        f"hf:{root / 'model'}", f"jsonl:{root / 'a.jsonl'}", max_gpu_mem="400MB", workdir=tmp_path / "run", resume=True
    )
    assert not (tmp_path / "run" / "hf" / "left").exists()
    assert Path(result.weights_file).read_bytes() == Path(trained.weights_file).read_bytes()
    lowmem_pnn.fit("mlp:64-10", "digits", max_gpu_mem="100MB", workdir=tmp_path / "run", overwrite=True, epochs=1)
    assert not (tmp_path / "run" / "hf").exists()


def test_it_goes_on_with_texts_as_transformers_does(root: Path, trained: Result, tmp_path: Path) -> None:
    # Its vocabulary is larger than the tokenizer, as is usual.
    model, reader = of_folder(Path(str(trained.transformers_folder))), open_tokenizer(str(root / "model"))
    prompts, expected = ["the cat sat", "a dog"], []
    model.generation_config.eos_token_id = None
    for prompt in prompts:
        ids = torch.from_numpy(reader.encode([prompt])[0])[None]
        expected.append(model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :].tolist())
    shutil.copytree(root / "model", tmp_path / "model")
    ends = [299, expected[0][5]]
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    said = lowmem_pnn.generate(trained, prompts, max_new_tokens=8, tokenizer=tmp_path / "model")
    for text, tokens in zip(said, expected, strict=True):
        places = [place for place, token in enumerate(tokens) if token in (0, *ends)]
        assert text == reader.decode(tokens[: min(places, default=8)])


def test_images_are_classified_by_a_vision_transformer(tmp_path: Path) -> None:
    model = make_model("vit", "AutoModelForImageClassification", VIT, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5], "image_std": [0.5]}))
    result = lowmem_pnn.fit(
        f"hf:{tmp_path / 'vit'}", "digits", max_gpu_mem="400MB", device="cpu", workdir=tmp_path / "run", epochs=1, lr=1e-3,
        train_limit=100, test_limit=20,
    )  # fmt: skip
    assert result.weights["new"] == []
    trained = of_folder(tmp_path / "run" / "hf", "AutoModelForImageClassification")
    assert not (tmp_path / "run" / "hf" / "preprocessor_config.json").exists()
    assert "- Images: values / 16; preprocessor_config.json has no words" in (tmp_path / "run" / "hf" / "README.md").read_text()
    answers = lowmem_pnn.predict(result)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(trained(pixel_values=x).logits, lowmem_pnn.load(result)(x), rtol=0, atol=1e-6)
    assert answers["scores"].shape[1] == 10


def test_a_new_head_classifies_sequences(tmp_path: Path) -> None:
    make_model("bert", "AutoModelForMaskedLM", BERT, num_hidden_layers=1).save_pretrained(tmp_path / "bert")
    torch.manual_seed(1)
    ids, labels = torch.randint(2, 300, (40, 9)), torch.arange(40) % 3
    samples = [({"input_ids": row, "attention_mask": (row > 20).long()}, int(y)) for row, y in zip(ids, labels, strict=True)]
    result = lowmem_pnn.fit(
        f"hf:{tmp_path / 'bert'}", samples, max_gpu_mem="400MB", device="cpu", workdir=tmp_path / "run", epochs=1,
        task="sequence-classification",
    )  # fmt: skip
    new = [name.partition(" ")[0] for name in result.weights["new"]]
    assert new == ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert result.training["lr"] == 2e-5
    model = of_folder(tmp_path / "run" / "hf", "AutoModelForSequenceClassification")
    assert model(input_ids=ids[:2]).logits.shape == (2, 3)


@pytest.mark.usefixtures("ascii_locale")
def test_a_configuration_alone_is_trained_from_random_values_on_bytes(tmp_path: Path) -> None:
    file = write_config(tmp_path / "лама.json", "llama", "LlamaForCausalLM", LLAMA, num_hidden_layers=1)
    (tmp_path / "a.txt").write_text("to be or not to be, " * 40)
    result = lowmem_pnn.fit(
        f"hf:{file}", f"text:{tmp_path / 'a.txt'}", max_gpu_mem="400MB", device="cpu", workdir=tmp_path / "run", epochs=1, seed=4
    )
    assert result.weights == {}
    assert result.method == "exact"
    assert result.preparation == {}
    of_folder(tmp_path / "run" / "hf")
    assert "# лама.json, trained from random values" in (tmp_path / "run" / "hf" / "README.md").read_text("utf-8")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for what it gives up
def test_peft_loads_an_adapter_with_its_base_and_its_tokenizer(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    shutil.copytree(root / "model", tmp_path / "model")
    write_tokenizer(tmp_path / "model", pad_token="<pad>")
    monkeypatch.chdir(tmp_path)
    options = {**OPTIONS, "data_root": root, "lora": "r=2", "lr": 0.1, "epochs": 1, "max_steps": 2}
    result = fit("hf:model", f"jsonl:{root / 'a.jsonl'}", tmp_path / "run", **options)
    assert "AutoPeftModel classes load it on its base, with its tokenizer" in str(result)
    assert result.transformers_folder is None
    monkeypatch.chdir(root)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(result.adapter).eval()
    ids = torch.arange(3, 15).view(1, 12)
    ours = lowmem_pnn.load(result, model=f"hf:{tmp_path / 'model'}")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, ours(ids))
    assert not torch.equal(of_folder(root / "model")(input_ids=ids).logits, ours(ids))
    words = transformers.AutoTokenizer.from_pretrained(result.adapter)("the cat")["input_ids"]
    assert words == transformers.AutoTokenizer.from_pretrained(tmp_path / "model")("the cat")["input_ids"]


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        del state[name]
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return change


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def index_of_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("change", "options", "code", "text"),
    [
        (without("model.norm.weight"), "", 3, "does not fit model hf:.*: missing in the file: model.norm.weight; give weights of"),
        (without("lm_head.weight"), "", 3, "missing in the file: lm_head.weight"),
        (cut, "", 6, "model.safetensors' .*; fetch the file again"),
        (index_of_nothing, "", 6, "00001-of-00002.safetensors' is missing, which .*index.json' names; fetch all of its files"),
        (no_tokenizer, "", 3, "--tokenizer .* is a folder without tokenizer.json; give the folder"),
        (None, "--context 64", 3, "--context 64: model hf:.* has positions for 32 tokens; give 32 at most"),
        (None, "--model-arg vocab_size=200", 3, "knows 200 tokens, and the tokenizer of the data has 279; give the model's own"),
        (None, "--model-arg hidden_size=32", 3, "does not fit model hf:.*model.embed_tokens.weight is .* in the model and .* in the file"),
        (None, "--task image-classification", 3, "transformers has no image-classification of type 'llama'; give another --task"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_do_is_said_in_a_line(
    change: Callable[[Path], None] | None, options: str, code: int, text: str, root: Path, tmp_path: Path
) -> None:
    write_llama(tmp_path / "model", num_hidden_layers=1)
    if change is not None:
        change(tmp_path / "model")
    common = f"--max-gpu-mem 200MB --device cpu --no-timing --data-root {root}"
    outcome = command(f"plan --model hf:{tmp_path / 'model'} --data jsonl:{root / 'a.jsonl'} {common} {options}")
    assert outcome.code == code, outcome.err + outcome.out
    assert re.search(text, outcome.fault or outcome.out), outcome.fault or outcome.out


def test_a_masked_model_is_not_trained_on_next_tokens_that_it_sees(tmp_path: Path) -> None:
    config = write_config(tmp_path / "bert.json", "bert", "BertForMaskedLM", BERT)
    (tmp_path / "words.txt").write_text("some words " * 200)
    outcome = command(f"fit --max-gpu-mem 200MB --model hf:{config} --data text:{tmp_path}/words.txt --workdir {tmp_path}/run")
    assert outcome.code == 3
    assert "has a masked-LM head, and data text:" in outcome.fault
    assert "asks for the next token, which it would see; give a causal model" in outcome.fault
    outcome = command(
        f"plan --max-gpu-mem 200MB --model hf:{config} --task causal-lm --data text:{tmp_path}/words.txt --no-timing"
    )
    assert outcome.code == 3
    assert (
        "sees the tokens after each token, which --task causal-lm is to learn; give --model-arg is_decoder=true" in outcome.fault
    )
