"""Small tokenizers, and files of text for them."""

import functools
import json
from pathlib import Path
from typing import Any

TEXT = "the cat sat on the mat. the dog sat on the log. a cat and a dog.\n" * 4
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>{% endgeneration %}"
    "{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
)


@functools.cache
def tokenizer_json(begins: bool = False) -> str:
    """A byte-level BPE with 279 tokens; `<end>` is 0, `<pad>` 1, `<begin>` 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>", "<pad>", "<begin>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 2)])
    return str(tokenizer.to_str())


def write_tokenizer(folder: Path, *, begins: bool = False, template: str | None = None, **settings: Any) -> Path:
    """A folder as `save_pretrained` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(begins))
    tokens = {"bos_token": "<begin>", "eos_token": "<end>", "pad_token": {"content": "<pad>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, **settings}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def pairs(count: int = 12) -> list[dict[str, str]]:
    """Prompts and completions of very unlike lengths."""
    words = TEXT.split()
    return [
        {"prompt": " ".join(words[n : n + 1 + n % 3]), "completion": " " + " ".join(words[n : n + 1 + (n * n) % 13])}
        for n in range(count)
    ]
