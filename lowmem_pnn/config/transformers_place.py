"""Places of transformers' models: what `hf:` names, and whether weights come with it. No torch here, and no transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TRANSFORMERS_TASKS = ("causal-lm", "masked-lm", "seq2seq", "sequence-classification", "image-classification")
"""Tasks that heads of transformers' models are for, as `--task` takes them."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files of a model's folder that belong to its tokenizer."""

# The largest configurations have some 100 kB, with the names of 20,000 classes.
_MOST_BYTES = 1 << 24
# Files of weights that are read (`pretrained/open_weights.py`); others that hold weights; and what trainers leave beside a model.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model.bin")
_UNREAD = ("*.bin", "*.h5", "*.msgpack", "*.gguf", "*.pth", "*.pt", "*.ckpt")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")


def is_transformers(model: str) -> bool:
    """Decide whether a text names a model of transformers.

    Args:
        model: Text of `--model`.
    """
    return model.partition(":")[0] == "hf"


def place_of(model: str) -> Path | None:
    """Return the folder or file that a model's text names; None for a name on the hub.

    Args:
        model: `hf:DIR`, `hf:CONFIG.json` or `hf:NAME`.
    """
    text = model.partition(":")[2]
    path = Path(text).expanduser() if text else Path("config.json")
    is_path = path.exists() or text.endswith(".json") or text.startswith((".", "/", "~")) or not text
    return path if is_path else None


def is_on_hub(model: str) -> bool:
    """Decide whether a text names a model on the hub, of which nothing is known before it is fetched.

    Args:
        model: Text of `--model`.
    """
    return is_transformers(model) and place_of(model) is None


def has_weights(model: str) -> bool:
    """Decide whether weights come with a model: a folder has such files, and a name on the hub is one of a model with weights.

    Args:
        model: Text of `--model`.
    """
    if not is_transformers(model):
        return False
    place = place_of(model)
    return place is None or (place.is_dir() and any(next(place.glob(pattern), None) is not None for pattern in _WEIGHTS))


def unread_weights(model: str) -> str | None:
    """Return the name of a file of weights that is not read, in a folder that has none that is; None where there is no such file.

    Args:
        model: Text of `--model`.
    """
    place = place_of(model) if is_transformers(model) else None
    if place is None or not place.is_dir() or has_weights(model):
        return None
    names = sorted(file.name for pattern in _UNREAD for file in place.glob(pattern))
    return next((name for name in names if not name.startswith(_NO_WEIGHTS)), None)


def is_about_text(model: str) -> bool:
    """Decide whether the configuration that a text names is that of a model of tokens; of a name on the hub it is not known.

    Args:
        model: Text of `--model`.
    """
    place = place_of(model) if is_transformers(model) else None
    if place is None:
        return False
    settings = read_settings(place / "config.json" if place.is_dir() else place) or {}
    return "vocab_size" in settings or isinstance(settings.get("text_config"), Mapping)


def read_settings(file: Path) -> dict[str, Any] | None:
    """Return what a file of settings in JSON says; None where it is missing, or none.

    Args:
        file: Path of the file.
    """
    try:
        if file.stat().st_size > _MOST_BYTES:
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
