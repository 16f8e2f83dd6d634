"""The adapter folder has the words and names of peft, which loads it into the plain model, a transformers model too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lowmem_pnn.adapters.adapter_folder import adapter_config, adapter_names, write_adapter
from lowmem_pnn.adapters.prepared_model import prepared
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.config.configure import configure
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores.keys import weight_key
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.tasks.make_task import OUTPUT_NAMES


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False, use_cache=False, bos_token_id=0, eos_token_id=0))


def config_of(**options: Any) -> Any:
    return configure(max_gpu_mem="1GB", model="python:model", data="python:data", **options)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Any]:
    """A model with adapters that are not at their beginning, on both kinds of linear layers, and a head that learns whole."""
    config = config_of(lora="r=2,alpha=3,targets=c_attn+c_proj", modules_to_save="lm_head")
    torch.manual_seed(0)
    model = prepared(gpt2(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lm_head" in name:
                parameter.normal_()
    return model.eval(), config


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for what it gives up
def test_peft_loads_what_is_written(trained: tuple[nn.Module, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, config = trained
    chain = capture(model, TensorSpec((5,), torch.int64), learns_from=OUTPUT_NAMES)
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    layout = {weight_key(name): (tensors[name].dtype, tuple(tensors[name].shape)) for name in chain.persistent}
    store = WeightStore.create(tmp_path / "weights", [layout])
    with store.writer(0) as file:
        for key in layout:
            file.write_from(key, tensors[key.removeprefix("weight/")].detach().contiguous())
    store.seal([0])
    folder = write_adapter(tmp_path, chain, config, store)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(gpt2(), folder).eval()
    ids = torch.arange(10).view(2, 5)
    assert torch.equal(theirs(input_ids=ids).logits, model(input_ids=ids).logits)
    theirs.save_pretrained(tmp_path / "again")
    again, own = (load_file(file / "adapter_model.safetensors") for file in (tmp_path / "again", folder))
    assert again.keys() == own.keys()


def test_the_configuration_has_the_words_of_peft(trained: tuple[nn.Module, Any]) -> None:
    peft = pytest.importorskip("peft")
    chain = capture(trained[0], TensorSpec((5,), torch.int64), learns_from=OUTPUT_NAMES)
    said = adapter_config(chain, trained[1])
    assert said.keys() <= peft.LoraConfig().to_dict().keys()
    assert (said["r"], said["lora_alpha"], said["fan_in_fan_out"]) == (2, 3, True)
    assert said["target_modules"] == ["c_attn", "c_proj"]
    assert said["modules_to_save"] == ["lm_head"]
    names = adapter_names(chain, trained[1])
    assert names["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"] == "transformer.h.0.attn.c_attn.lora_A"
    assert names["base_model.model.lm_head.weight"] == "lm_head.weight"
