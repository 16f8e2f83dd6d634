"""Does a run train a Hugging Face model as transformers' own Trainer does, and adapters as Trainer with peft does?

A small Llama with a tokenizer of its own, both made here, is trained for 20 steps by `fit --method exact`, cut into a partition for every
layer, and by `transformers.Trainer`, from the same folder, on the same rows in the same order: float32, CPU, no dropout, batches of 8 in
parts of 2 (`gradient_accumulation_steps=4`). Losses of every step and the trained weights are compared.

    python bench/hf_trainer.py [--quick]

Needs transformers, accelerate and peft. Two minutes on two cores; --quick takes one case.
"""

import argparse
import json
import random
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import markdown_table, write_results

STEPS, BATCH, PART, CONTEXT, SEED = 20, 8, 2, 48, 3
TEXT = "the cat sat on a mat and dog ran to log house tree while it rained all day in old town by sea"
LLAMA = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2 * CONTEXT, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is compared.

    Args:
        name: in words.
        optimizer: name of the optimizer, as Trainer has it.
        padded: whether rows are of unlike lengths, and padded; else all have the same length.
        lora: whether adapters learn, and nothing else.
        losses: most relative difference of a step's loss that is asked for: sums over a batch's parts, which each adds up in its way.
        weights: most difference of a weight; 0 for the same bits.
        ours: options of `fit`.
        theirs: arguments of Trainer.
    """

    name: str
    optimizer: str
    padded: bool
    lora: bool
    losses: float
    weights: float
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)


_SGD: dict[str, Any] = {"ours": {"optimizer": "sgd", "momentum": 0, "lr": 0.3}, "theirs": {"learning_rate": 0.3}}
_ADAMW: dict[str, Any] = {
    "ours": {"optimizer": "adamw", "lr": 1e-3, "eps": 1e-4, "weight_decay": 0.0, "fused": False},
    "theirs": {"learning_rate": 1e-3, "adam_epsilon": 1e-4, "weight_decay": 0.0},
}
CASES = (
    Case("SGD, padded rows", "sgd", True, False, 1e-5, 1e-5, **_SGD),
    Case("AdamW (eps 1e-4), padded rows", "adamw_torch", True, False, 1e-4, 1e-4, **_ADAMW),
    Case("LoRA of rank 8, SGD, padded rows, peft", "sgd", True, True, 1e-5, 1e-5, **_SGD),
    Case("LoRA of rank 8, AdamW (eps 1e-4), padded rows, peft", "adamw_torch", True, True, 1e-4, 1e-4, **_ADAMW),
    Case("SGD, rows of one length", "sgd", False, False, 1e-6, 0.0, **_SGD),
    Case("AdamW (eps 1e-4), rows of one length", "adamw_torch", False, False, 1e-6, 0.0, **_ADAMW),
)


def make_folder(folder: Path) -> None:
    """Write a Llama with random values, its tokenizer, and rows of text."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    chosen = random.Random(SEED)

    def text(count: int) -> str:
        return " ".join(chosen.choices(TEXT.split(), k=count))

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>", "<pad>", "<begin>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text(2000)], trainer)
    config = transformers.LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **LLAMA)
    torch.manual_seed(SEED)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    (folder / "model" / "tokenizer.json").write_text(tokenizer.to_str())
    tokens = {"bos_token": "<begin>", "eos_token": "<end>", "pad_token": "<pad>"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(tokens))
    count = STEPS * BATCH
    pairs = [{"prompt": text(1 + n % 7), "completion": " " + text(1 + (n * n) % 23)} for n in range(count)]
    (folder / "padded.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    (folder / "whole.txt").write_text(text(3 * count * CONTEXT // 2))


def rows_of(folder: Path, case: Case, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that a run sees, in its order, as Trainer takes them; their labels are moved by one already."""
    from lowmem_pnn.config.configure import configure
    from lowmem_pnn.language.language_form import LanguageForm
    from lowmem_pnn.language.open_language import open_language
    from lowmem_pnn.seeds import permutation_of
    from lowmem_pnn.workload.parts import split_data

    config = configure(max_gpu_mem="1GB", **options)
    form = LanguageForm(str(folder / "model"), CONTEXT, False, "completions", folder / "tokens")
    train = split_data(open_language(config.data, form), config)[1]["train"]
    assert len(train) >= STEPS * BATCH
    order = permutation_of(len(train), SEED, "epoch", 0)[: STEPS * BATCH]
    inputs, labels = train.batch(order)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    names = ("input_ids", "attention_mask")[: len(given)]
    return [
        {**dict(zip(names, row, strict=True)), "labels": label, "shift_labels": label}
        for *row, label in zip(*given, labels, strict=True)
    ]


def train_theirs(model: Any, rows: list[dict[str, Any]], case: Case, folder: Path) -> list[float]:
    """Train a model by transformers' Trainer and return the loss of every step."""
    import torch
    import transformers

    losses: list[float] = []

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=PART, gradient_accumulation_steps=BATCH // PART, num_train_epochs=1, optim=case.optimizer,
        lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no", remove_unused_columns=False, **case.theirs,
    )  # fmt: skip
    InOrder(model, arguments, train_dataset=rows).train()
    return torch.tensor(losses).view(-1, BATCH // PART).sum(1).tolist()


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Train by both, and return the largest differences."""
    import torch
    import transformers
    from safetensors.torch import load_file

    import lowmem_pnn

    source = f"jsonl:{folder / 'padded.jsonl'}" if case.padded else f"text:{folder / 'whole.txt'}"
    options: dict[str, Any] = {
        "model": f"hf:{folder / 'model'}", "data": source, "data_root": folder, "method": "exact", "epochs": 1, "batch_size": BATCH,
        "seed": SEED, "context": CONTEXT, "val_fraction": 0, "lr_schedule": "constant", "clip_norm": 0, "max_steps": STEPS,
        "micro_batch": PART, "partitions": 4, **case.ours,
    }  # fmt: skip
    options |= {"test_fraction": 0} if case.padded else {}
    options |= {"lora": "r=8,alpha=16,targets=q_proj+v_proj"} if case.lora else {}
    fit = {"max_gpu_mem": "1GB", "device": "cpu", "log_every": 1, **options, "train": options["data"]}
    del fit["data"]

    with tempfile.TemporaryDirectory() as runs:
        result = lowmem_pnn.fit(**fit, workdir=f"{runs}/run")
        lines = [json.loads(line) for line in (Path(runs) / "run" / "metrics.jsonl").read_text().splitlines()]
        ours = [line["loss"] for line in lines if "step" in line]
        if case.lora:
            # What the adapters began with: a step that moves nothing.
            still = {**fit, "max_steps": 1, "optimizer": "sgd", "momentum": 0, "lr": 1e-30}
            begun = lowmem_pnn.fit(
                **{key: value for key, value in still.items() if key != "eps"}, workdir=f"{runs}/begun"
            ).adapter
        weights = load_file(Path(str(result.adapter)) / "adapter_model.safetensors" if case.lora else result.weights_file)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
        if case.lora:
            import peft

            model = peft.PeftModel.from_pretrained(model, begun, is_trainable=True)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.zeros_(parameter)
        theirs = train_theirs(model, rows_of(folder, case, options), case, Path(runs) / "theirs")
    if case.lora:
        expected = {name.replace(".default", ""): one for name, one in model.state_dict().items() if "lora_" in name}
    else:
        expected = dict(model.state_dict())
    assert len(ours) == len(theirs) == STEPS
    assert weights.keys() <= expected.keys()
    return {
        "loss": max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True)),
        "first": theirs[0],
        "last": theirs[-1],
        "weights": max(float((tensor - expected[name]).abs().max()) for name, tensor in weights.items()),
        "equal": all(torch.equal(tensor, expected[name]) for name, tensor in weights.items()),
    }


def main() -> None:
    """Compare all cases and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case; writes no page")
    arguments = parser.parse_args()
    rows, data = [], []
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        for case in CASES[-1:] if arguments.quick else CASES:
            found = compare(case, Path(folder))
            is_held = found["loss"] <= case.losses and (found["equal"] if not case.weights else found["weights"] <= case.weights)
            rows.append(
                [
                    case.name,
                    f"{found['first']:.4f} to {found['last']:.4f}",
                    f"{found['loss']:.1e}",
                    f"{case.losses:.0e}",
                    "same bits" if found["equal"] else f"{found['weights']:.1e}",
                    f"{case.weights:.0e}" if case.weights else "same bits",
                    "yes" if is_held else "no",
                ]
            )
            data.append({"case": case.name, "held": is_held, **found})
            print(*rows[-1], sep="\t", file=sys.stderr, flush=True)
    heads = ("", "loss, theirs", "losses differ by (relative)", "asked", "weights differ by", "asked", "held")
    text = "\n".join(
        [
            f"{STEPS} steps, batches of {BATCH} in parts of {PART}, rows of up to {CONTEXT} tokens, float32, CPU; ours in 4 partitions.",
            "",
            markdown_table(heads, rows),
        ]
    )
    write_results("hf_trainer", "Beside transformers' Trainer, step by step", text, {"cases": data}, write=not arguments.quick)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
