"""Models of transformers that benches train: a small configuration of each family, built here, and random samples for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BLOCKS, WIDTH, HEADS, WORDS, LENGTH, CLASSES = 6, 128, 4, 512, 64, 10
_SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH,
    "max_position_embeddings": 2 * LENGTH, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2}
_SHORT: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": WIDTH}
_VISION: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH, "image_size": 64,
    "patch_size": 8, "num_labels": CLASSES,
}  # fmt: skip
_TEXT: dict[str, Any] = {key: value for key, value in _VISION.items() if key not in ("image_size", "patch_size", "num_labels")}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        kind: what it learns: the next of some "tokens", the class of a "text" or of an "image", tokens of "speech", or a "pair" of both.
        model: class in transformers.
        config: class of its configuration.
        sizes: arguments of the configuration.
        blocks: blocks that it has.
        call: arguments of its forward.
        reason: why it is not cut at its blocks, where it is not.
    """

    kind: str
    model: str
    config: str
    sizes: dict[str, Any]
    blocks: int = BLOCKS
    call: tuple[tuple[str, Any], ...] = ()
    reason: str = ""


FAMILIES: dict[str, Family] = {
    "GPT-2": Family(
        "tokens", "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": 2 * LENGTH},
    ),
    "GPT-NeoX": Family("tokens", "GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES),
    "OPT": Family(
        "tokens", "OPTForCausalLM", "OPTConfig",
        {
            **_SHORT, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "ffn_dim": 4 * WIDTH, "word_embed_proj_dim": WIDTH,
            "max_position_embeddings": 2 * LENGTH,
        },
    ),
    "Llama": Family("tokens", "LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "Mistral": Family("tokens", "MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 16}),
    "Qwen2": Family("tokens", "Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "Qwen3": Family("tokens", "Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 32}),
    "Gemma 2": Family("tokens", "Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "head_dim": 32, "sliding_window": 16}),
    "Gemma 3": Family("tokens", "Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 32, "sliding_window": 16}),
    "Phi": Family("tokens", "PhiForCausalLM", "PhiConfig", _SIZES),
    "Phi-3": Family("tokens", "Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "BLOOM": Family("tokens", "BloomForCausalLM", "BloomConfig", {**_SHORT, "n_layer": BLOCKS, "n_head": HEADS}),
    "Falcon": Family(
        "tokens", "FalconForCausalLM", "FalconConfig", {**_SHORT, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS}
    ),
    "Mixtral": Family("tokens", "MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "Qwen2-MoE": Family(
        "tokens", "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    ),
    "Mamba": Family(
        "tokens", "MambaForCausalLM", "MambaConfig", {**_SHORT, "num_hidden_layers": BLOCKS, "state_size": 8},
        call=(("use_cache", False),),  # in eval mode its cache is another order of sums; `hf:` models have none
    ),
    "BERT": Family("text", "BertForSequenceClassification", "BertConfig", {**_SIZES, "num_labels": CLASSES}),
    "RoBERTa": Family("text", "RobertaForSequenceClassification", "RobertaConfig", {**_SIZES, "num_labels": CLASSES}),
    "DistilBERT": Family(
        "text", "DistilBertForSequenceClassification", "DistilBertConfig",
        {
            "vocab_size": WORDS, "dim": WIDTH, "n_layers": BLOCKS, "n_heads": HEADS, "hidden_dim": 4 * WIDTH, "num_labels": CLASSES,
            "max_position_embeddings": 2 * LENGTH,
        },
    ),
    "ELECTRA": Family(
        "text", "ElectraForSequenceClassification", "ElectraConfig", {**_SIZES, "embedding_size": 64, "num_labels": CLASSES}
    ),
    "DeBERTa-v2": Family(
        "text", "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {
            **_SIZES, "relative_attention": True, "position_buckets": 32, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm",
            "share_att_key": True, "num_labels": CLASSES,
        },
        reason="every block uses a normalised table of weights, one for all samples",
    ),
    "ALBERT": Family(
        "text", "AlbertForSequenceClassification", "AlbertConfig", {**_SIZES, "embedding_size": 64, "num_labels": CLASSES}
    ),
    "ViT": Family("image", "ViTForImageClassification", "ViTConfig", _VISION),
    "DeiT": Family("image", "DeiTForImageClassification", "DeiTConfig", _VISION),
    "Swin": Family(
        "image", "SwinForImageClassification", "SwinConfig",
        {"image_size": 64, "patch_size": 2, "embed_dim": 32, "depths": [2, 4], "num_heads": [2, 4], "window_size": 4, "num_labels": CLASSES},
        reason="two blocks of the first stage are one layer",
    ),
    "ConvNeXt": Family(
        "image", "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 3, 1], "image_size": 64, "num_labels": CLASSES},
    ),
    "DINOv2": Family("image", "Dinov2ForImageClassification", "Dinov2Config", {**_VISION, "drop_path_rate": 0.1}),
    "BEiT": Family(
        "image", "BeitForImageClassification", "BeitConfig", {**_VISION, "use_relative_position_bias": True, "drop_path_rate": 0.1}
    ),
    "T5": Family(
        "tokens", "T5ForConditionalGeneration", "T5Config",
        {
            "vocab_size": WORDS, "d_model": WIDTH, "d_kv": 32, "d_ff": 4 * WIDTH, "num_layers": BLOCKS // 2, "num_heads": HEADS,
            "decoder_start_token_id": 0,
        },
        call=(("use_cache", False),),
        reason="the blocks of a stack share a table of positions that learns, one for all samples",
    ),
    "Whisper": Family(
        "speech", "WhisperForConditionalGeneration", "WhisperConfig",
        {
            "vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": BLOCKS // 2, "decoder_layers": BLOCKS // 2,
            "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 4 * WIDTH, "decoder_ffn_dim": 4 * WIDTH,
            "num_mel_bins": 16, "max_source_positions": LENGTH, "max_target_positions": 2 * LENGTH, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "decoder_start_token_id": 1,
        },
    ),
    "CLIP": Family(
        "pair", "CLIPModel", "CLIPConfig",
        {
            "text_config": {**_SIZES, "num_hidden_layers": BLOCKS // 2, "eos_token_id": WORDS - 1},
            "vision_config": {**_TEXT, "num_hidden_layers": BLOCKS // 2, "image_size": 64, "patch_size": 8},
            "projection_dim": CLASSES // 2,
        },
    ),
}  # fmt: skip


def builder_of(name: str) -> Callable[[], Any]:
    """Return the function that builds a family's model, in a module that returns its scores."""
    family = FAMILIES[name]

    def build() -> Any:
        import torch
        import transformers
        from torch import nn

        class Scores(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = getattr(transformers, family.model)(getattr(transformers, family.config)(**family.sizes))

            def forward(self, x: Any, ids: Any = None) -> Any:
                more = dict(family.call)
                if family.kind == "image":
                    return self.model(pixel_values=x).logits
                if family.kind == "speech":
                    return self.model(input_features=x, decoder_input_ids=ids, **more).logits
                if family.kind == "pair":
                    both = self.model(pixel_values=x, input_ids=ids)
                    return torch.cat([both.image_embeds, both.text_embeds], 1)
                if name == "T5":
                    return self.model(input_ids=x, decoder_input_ids=x, **more).logits
                return self.model(input_ids=x, **more).logits

        return Scores()

    return build


def data_of(name: str, count: int) -> Any:
    """Return so many random samples of a family, and what is to be learnt of them."""
    import torch

    kind, generator = FAMILIES[name].kind, torch.Generator().manual_seed(0)
    ids = torch.randint(3, WORDS - 1, (count, LENGTH + 1), generator=generator)
    classes = torch.arange(count) % CLASSES
    if kind == "tokens":
        return ids[:, :-1].clone(), ids[:, 1:].clone()
    if kind == "text":
        return ids[:, :-1].clone(), classes
    if kind == "speech":
        return (torch.rand(count, 16, 2 * LENGTH, generator=generator), ids[:, :-1].clone()), ids[:, 1:].clone()
    images = torch.rand(count, 3, 64, 64, generator=generator)
    ids[:, LENGTH - 1] = WORDS - 1  # CLIP looks at the place where a text ends
    return ((images, ids[:, :-1].clone()), classes) if kind == "pair" else (images, classes)
