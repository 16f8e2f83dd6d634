"""Adapter folder: what a run with adapters has learnt, as peft writes it and reads it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem_pnn.adapters.lora import ADAPTER_NAMES, heads_for_classes, is_inside, is_within, whole_module_of
from lowmem_pnn.adapters.prepared_model import adapter_modules
from lowmem_pnn.config.adapter_options import ALL_LINEAR
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.transformers_place import has_weights, place_of
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.quantization.stored_weights import is_conv1d
from lowmem_pnn.stores.disk import disk_error, refuse_link, write_durably
from lowmem_pnn.stores.journal import DAMAGED
from lowmem_pnn.stores.run_creation import ADAPTER_FILES, ADAPTER_FOLDER
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.zoo.model_source import ModelSource

# What peft puts before the names of the model that it wraps.
_PREFIX = "base_model.model."


# What peft calls the tasks whose models it wraps in classes of their own.
_TASK_TYPES = {"causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "sequence-classification": "SEQ_CLS"}


def write_adapter(run: Path, chain: Chain, config: FitConfig, weights: WeightStore, source: ModelSource) -> Path:
    """Write the adapters of a trained model, and the modules that have learnt whole beside them, into the run's folder.

    Args:
        run: folder of the run.
        chain: the model in layers.
        config: options of the run, with adapters.
        weights: weight files of the run, sealed.
        source: the model.

    Returns:
        The folder, which `peft.PeftModel.from_pretrained(base, folder)` reads; of a model of transformers it names the base, and has the
        tokenizer's files.

    Raises:
        DiskError: the disk is full, or not writable.
    """
    folder = run / ADAPTER_FOLDER
    refuse_link(folder, DAMAGED)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error, "make it") from error
    config_file, weights_file = ADAPTER_FILES
    task = None if source.transformers is None else _TASK_TYPES.get(source.transformers.task)
    heads = heads_for_classes(chain.persistent) if task == "SEQ_CLS" else []
    names = adapter_names(chain, config, heads)
    weights.export(folder / weights_file, list(names), {name: chain.owner_of(own) for name, own in names.items()})
    said = adapter_config(chain, config, heads) | {"task_type": task}
    for name, file in source.tokenizer_files(config.tokenizer).items():
        write_durably(folder / name, file.read_bytes())
    write_durably(folder / config_file, json.dumps(said, indent=2, sort_keys=True) + "\n")
    return folder


def _base_of(model: str) -> tuple[str | None, str | None]:
    """Return the folder, or the name on the hub, that a base is loaded from, and its revision; None where weights come with none."""
    if not has_weights(model):
        return None, None
    if (place := place_of(model)) is not None:
        return str(place.absolute()), None  # loaded from wherever
    name, _, revision = model.removeprefix("hf:").partition("@")
    return name, revision or None


def adapter_names(chain: Chain, config: FitConfig, heads: Sequence[str] = ()) -> dict[str, str]:
    """Return the names of the tensors that belong to an adapter, as peft has them in its file, each with its name in the model.

    Args:
        chain: the model in layers.
        config: options of the run.
        heads: modules that the file has whole, learnt or not (`heads_for_classes`).

    Example:
        `base_model.model.layers.0.q_proj.lora_A.weight` is `layers.0.q_proj.lora_A`.
    """
    names = {}
    for module in adapter_modules(chain.modules()):
        for own in ADAPTER_NAMES:
            if chain.owner_of(f"{module}.{own}") == f"{module}.{own}":
                names[f"{_PREFIX}{module}.{own}.weight"] = f"{module}.{own}"
    whole = config.modules_to_save or ()
    saved = (name for name in chain.persistent if is_within(name, whole) or is_inside(name, heads))
    return names | {f"{_PREFIX}{name}": name for name in saved}


def adapter_config(chain: Chain, config: FitConfig, heads: Sequence[str] = ()) -> dict[str, Any]:
    """Return what `adapter_config.json` says, in the words of peft's `LoraConfig`.

    Args:
        chain: the model in layers.
        config: options of the run.
        heads: modules that the file has whole, learnt or not (`heads_for_classes`).
    """
    lora = config.lora
    assert lora is not None, "only runs with adapters have an adapter"
    modules = adapter_modules(chain.modules())
    base, revision = _base_of(config.model)
    saved = list(config.modules_to_save or ())
    if heads:
        # Each by its whole name, and those in a head by the head's: peft would wrap one inside of the other.
        inside = (whole_module_of(name, saved) for name in chain.persistent if not is_inside(name, heads))
        saved = [*dict.fromkeys(module for module in inside if module is not None), *heads]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(modules) if lora.targets == (ALL_LINEAR,) else list(lora.targets),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(is_conv1d(module) for module in modules.values()),  # type: ignore[arg-type]
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
