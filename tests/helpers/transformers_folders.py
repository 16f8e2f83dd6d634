"""Small models of transformers in folders, as `save_pretrained` writes them."""

import json
from pathlib import Path
from typing import Any

import torch

from helpers.language import write_tokenizer

LLAMA = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 32, "vocab_size": 300, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 0,
}  # fmt: skip
VIT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    "num_channels": 1, "num_labels": 10, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
BERT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
    "vocab_size": 300, "pad_token_id": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
T5 = {
    "vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "dropout_rate": 0.0,
    "decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": 300, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32, "dropout": 0.0, "pad_token_id": 1, "bos_token_id": 2,
    "eos_token_id": 0, "decoder_start_token_id": 0, "forced_eos_token_id": 0,
}  # fmt: skip


def make_model(model_type: str, auto: str, sizes: dict[str, Any], seed: int = 5, **options: Any) -> Any:
    """A model with random values, of a size at which they matter."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **options})
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write_llama(folder: Path, *, shard: str = "5GB", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A small Llama with a tokenizer."""
    model = make_model("llama", "AutoModelForCausalLM", LLAMA, **options)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return write_tokenizer(folder)


def write_config(path: Path, model_type: str, architecture: str | None, sizes: dict[str, Any], **options: Any) -> Path:
    """A `config.json` alone."""
    named = {} if architecture is None else {"architectures": [architecture]}
    path.write_text(json.dumps({"model_type": model_type, **named, **sizes, **options}))
    return path


def of_folder(folder: Path, auto: str = "AutoModelForCausalLM") -> Any:
    """The model in a folder, of which no tensor is missing and none is too many."""
    import transformers

    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()
