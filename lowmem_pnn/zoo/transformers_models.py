"""Models of transformers: `hf:DIR`, `hf:CONFIG.json`, `hf:NAME`; with the names of their own `state_dict`, and logits alone as outputs."""

import copy
import importlib
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem_pnn.config.transformers_place import TRANSFORMERS_TASKS, has_weights, place_of, read_settings
from lowmem_pnn.errors import ConfigError, LowMemError
from lowmem_pnn.sources.imports import did_you_mean, one_line
from lowmem_pnn.sources.preprocessing import InputForm
from lowmem_pnn.zoo.model_source import ModelSource, TransformersFacts, folder_name, too_many_tokens
from lowmem_pnn.zoo.transformers_images import image_stats
from lowmem_pnn.zoo.transformers_modules import give_values, returning_logits

# Auto classes of each task, each with the names of its models by the type of their configurations. Some that write can fill gaps too: the
# first task that has an architecture is its.
_AUTO: dict[str, tuple[tuple[str, str], ...]] = {
    "causal-lm": (("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),),
    "seq2seq": (
        ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
        ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    ),
    "masked-lm": (("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),),
    "sequence-classification": (("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),),
    "image-classification": (("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),),
}
# A sample of text has so many tokens where neither --context nor the model says less: as where there is no model to ask.
_CONTEXT = 256
# Their positions begin after that of padding.
_PADDED_POSITIONS = ("roberta", "camembert", "data2vec-text", "longformer", "mpnet", "esm", "luke")
# What a hub's folder has beside its weights.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
# What transformers calls the problems of a classifier, by kinds of targets.
_PROBLEMS = {"class": "single_label_classification", "labels": "multi_label_classification", "values": "regression"}


def import_transformers() -> Any:
    """Import transformers, which is an extra, and slow to import.

    Raises:
        ConfigError: It is not installed, is too old, or does not import.
    """
    try:
        module = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != "transformers":
            raise ConfigError(
                f"transformers needs {error.name!r}, which is not installed; run: pip install {error.name}"
            ) from error
        raise ConfigError("hf: needs transformers, which is not installed; run: pip install 'lowmem-pnn[hf]'") from error
    except (ImportError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"importing transformers failed with {one_line(error)}; run: pip install 'lowmem-pnn[hf]'") from error
    if int(module.__version__.partition(".")[0]) < 5:
        raise ConfigError(f"transformers is {module.__version__}, and hf: needs 5.0; run: pip install 'lowmem-pnn[hf]'")
    return module


def find_transformers_model(spec: str, arguments: Mapping[str, Any], num_classes: int | None, task: str) -> ModelSource:
    """Find a model of transformers: its configuration is read, and nothing is built.

    Args:
        spec: `hf:DIR`, a folder as `save_pretrained` writes it; `hf:CONFIG.json`, for random values; or `hf:NAME`, `hf:NAME@REVISION`
            of the hub, which transformers' own client fetches and keeps.
        arguments: Values that the configuration is to have instead, and `attn_implementation`.
        num_classes: Number of classes of the data set; of tokens for a language model. None where it is not known.
        task: What `--task` says: one of `TRANSFORMERS_TASKS`, or anything else for that of the architecture.

    Raises:
        ConfigError: There is no such model, it needs code of its own, or does not take these arguments.
    """
    transformers = import_transformers()
    folder, settings = _open(spec)
    kind = _config_class(spec, settings)
    chosen, architecture = _task(spec, settings, task)
    notes: list[str] = []
    config = _configured(spec, kind, settings, arguments, notes)
    _check_causal(spec, chosen, config)
    is_language = chosen in ("causal-lm", "masked-lm", "seq2seq")
    if num_classes is not None and not is_language and config.num_labels != num_classes:
        if "num_labels" in arguments:
            raise ConfigError(
                f"model {spec!r}: num_labels={arguments['num_labels']}, but the data set has {num_classes} classes; give "
                f"num_labels={num_classes}"
            )
        config.num_labels = num_classes
    text = config.get_text_config()
    if num_classes is not None and is_language and num_classes > text.vocab_size:
        raise ConfigError(too_many_tokens(spec, text.vocab_size, num_classes))
    model_class = _model_class(spec, transformers, config, chosen)
    attention = arguments.get("attn_implementation", "sdpa" if model_class._supports_sdpa else "eager")
    notes.insert(0, f"{model_class.__name__} of transformers {transformers.__version__} ({chosen}), attention by {attention}")
    build = _Constructor(spec, chosen, config, attention)
    if build.experts is not None:
        notes.append(f"experts are computed by {build.experts}, which any number of tokens goes through alike")
    if getattr(text, "output_router_logits", False):
        notes.append("the loss is that of the logits; the router's auxiliary loss is left out")
    if chosen == "causal-lm":
        notes.append("it is given no attention_mask: rows are padded at their end, where no token before looks")
    tokenizer = None if chosen == "image-classification" or folder is None or not _has_tokenizer(folder) else str(folder)
    most = _most_context(settings, text)
    stats, unfollowed = image_stats(folder) if chosen == "image-classification" else (None, None)
    notes += [] if unfollowed is None else [unfollowed]
    return ModelSource(
        folder_name(f"hf-{Path(spec.removeprefix('hf:')).name.removesuffix('.json')}"),
        spec,
        build,
        _input_form(config) if chosen == "image-classification" else "any",
        context=min(_CONTEXT, most or _CONTEXT) if is_language and chosen != "seq2seq" else None,
        default_weights=_weights(spec, folder),
        image_stats=stats,
        tokenizer=tokenizer,
        most_context=most if chosen != "image-classification" else None,
        notes=tuple(notes),
        transformers=TransformersFacts(
            config,
            model_class.__name__,
            folder,
            chosen,
            architecture != model_class.__name__,
            bool(settings.get("use_cache", True)),
            bool((settings.get("text_config") or {}).get("use_cache", True)),
        ),
        give_values=give_values,
    )


def _open(spec: str) -> tuple[Path | None, dict[str, Any]]:
    """Return the folder of a model, and what its configuration says."""
    place = place_of(spec)
    if place is None:
        place = _fetch(spec, _SMALL_FILES)
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        adapter = " (it is an adapter's: give that of its base)" if (place / "adapter_config.json").is_file() else ""
        raise ConfigError(f"model {spec}: there is no config.json in that folder{adapter}; give one that save_pretrained wrote")
    settings = read_settings(file)
    if settings is None:
        raise ConfigError(f"model {spec}: {file} is no configuration in JSON; give one that save_pretrained wrote")
    return file.parent, settings


def _fetch(spec: str, patterns: tuple[str, ...]) -> Path:
    """Fetch files of a model on the hub; return their folder in the client's cache."""
    name, _, revision = spec.removeprefix("hf:").partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ConfigError(f"model {spec!r}: there is no such folder or file; give hf:DIR, hf:CONFIG.json, or a name on the hub")
    hub = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
    except Exception as error:  # whatever the client raises for a network that is not there, or a name that nobody has
        raise ConfigError(
            f"model {spec}: there is no such folder, and the hub's model {name!r} cannot be fetched: {one_line(error)[:200]}; see to "
            "the network and the name, or give hf:DIR"
        ) from error


def _fetch_weights(spec: str) -> Path:
    """Fetch the weights of a model on the hub, and none beside them; return their folder."""
    # A repository may have them twice, in another type or for another program.
    folder = _fetch(spec, (_INDEX,))
    homes = (read_settings(folder / _INDEX) or {}).get("weight_map")
    if isinstance(homes, dict):
        return _fetch(spec, (_INDEX, *sorted(set(map(str, homes.values())))))
    folder = _fetch(spec, (_WHOLE,))
    if not (folder / _WHOLE).is_file():
        folder = _fetch(spec, ("*.safetensors", "*.safetensors.index.json"))
    if next(folder.glob("*.safetensors"), None) is None:
        raise ConfigError(
            f"model {spec}: the hub has no safetensors of it, only weights of another kind, if any; give --weights FILE, or hf:DIR with "
            "weights that save_pretrained wrote"
        )
    return folder


def _config_class(spec: str, settings: Mapping[str, Any]) -> Any:
    known = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    kind = settings.get("model_type")
    if kind in known:
        return known[kind]
    if "auto_map" in settings:
        raise ConfigError(
            f"model {spec} runs code of its own (auto_map), which is never trusted; give a model that transformers has"
        )
    what = f"is of type {kind!r}, which transformers has not" if kind else "says no model_type"
    raise ConfigError(
        f"model {spec}: its configuration {what}{did_you_mean(str(kind), list(known)) if kind else ''}; give another"
    )


def _task(spec: str, settings: Mapping[str, Any], asked: str) -> tuple[str, str | None]:
    """Return the task of a model, and the architecture that its weights are of."""
    names = settings.get("architectures") or [None]
    architecture = names[0] if isinstance(names, list) else None
    if asked in TRANSFORMERS_TASKS:
        return asked, architecture
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    for task, mappings in _AUTO.items():
        for name in itertools.chain(*(getattr(auto, mapping).values() for _, mapping in mappings)):
            if architecture in (name if isinstance(name, tuple) else (name,)):
                return task, architecture
    what = f"its architecture {architecture!r} has another head" if architecture else "its configuration names no architecture"
    raise ConfigError(f"model {spec}: {what}; give --task {', '.join(TRANSFORMERS_TASKS[:-1])} or {TRANSFORMERS_TASKS[-1]}")


def _check_causal(spec: str, task: str, config: Any) -> None:
    """Refuse next tokens for an encoder's attention, which sees them: such families have masked-LM heads too."""
    masked = importlib.import_module("transformers.models.auto.modeling_auto").MODEL_FOR_MASKED_LM_MAPPING_NAMES
    remedy = None
    if config.model_type in masked and not getattr(config, "is_decoder", False):
        remedy = "is_decoder=true"
    elif getattr(config.get_text_config(), "use_bidirectional_attention", False) is True:
        remedy = "use_bidirectional_attention=false"
    if task == "causal-lm" and remedy is not None:
        raise ConfigError(
            f"model {spec}: attention of type {config.model_type!r} sees the tokens after each token, which --task causal-lm is to learn; "
            f"give --model-arg {remedy}"
        )


def _configured(spec: str, kind: Any, settings: Mapping[str, Any], arguments: Mapping[str, Any], notes: list[str]) -> Any:
    """Return the configuration, with what the arguments change in it."""
    values = {name: value for name, value in settings.items() if name != "auto_map"}
    if "auto_map" in settings:
        notes.append("the code that its configuration names (auto_map) is not run: transformers has this model")
    if settings.get("gradient_checkpointing"):
        notes.append("gradient_checkpointing of its configuration has no effect: layers are computed again as the plan says")
        del values["gradient_checkpointing"]
    if "quantization_config" in settings:
        raise ConfigError(
            f"model {spec} has quantized weights (quantization_config), which cannot be trained; give its float weights"
        )
    own = {name: value for name, value in arguments.items() if name != "attn_implementation"}
    try:
        with _quiet():
            plain = kind.from_dict(dict(values))
            for name in own:
                if not hasattr(plain, name) or name in ("model_type", "auto_map"):
                    known = [one for one in plain.to_dict() if not one.startswith("_")]
                    raise ConfigError(
                        f"model {spec!r} has no argument {name!r}{did_you_mean(name, known)}; it takes what its config.json has"
                    )
            config = kind.from_dict({**values, **own}) if own else plain
    except LowMemError:
        raise
    except Exception as error:  # of a configuration class, for values that it refuses
        raise ConfigError(
            f"model {spec}: its configuration is refused by transformers: {one_line(error)[:300]}; see to it"
        ) from error
    for one in (config, config.get_text_config()):
        one.use_cache = False
    return config


def _auto_class(spec: str, transformers: Any, config: Any, task: str) -> Any:
    """Return the auto class of a task that has models of this configuration."""
    for name, _ in _AUTO[task]:
        with _quiet():
            auto = getattr(transformers, name)
            if type(config) in auto._model_mapping:
                return auto
    raise ConfigError(f"model {spec}: transformers has no {task} of type {config.model_type!r}; give another --task")


def _model_class(spec: str, transformers: Any, config: Any, task: str) -> Any:
    auto = _auto_class(spec, transformers, config, task)
    with _quiet():
        found = auto._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple | list) else found


def _most_context(settings: Mapping[str, Any], text: Any) -> int | None:
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    if any(
        str(settings.get("model_type", "")).endswith(name) or name in str(settings.get("model_type"))
        for name in _PADDED_POSITIONS
    ):
        most -= (getattr(text, "pad_token_id", None) or 0) + 1
    return most


def _has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
    return any((folder / name).is_file() for name in names)


def _input_form(config: Any) -> InputForm:
    return "image3" if getattr(config, "num_channels", 3) == 3 else "any"


def _weights(spec: str, folder: Path | None) -> Callable[[], Path] | None:
    """Return what leads to a model's own weights; None for a configuration alone."""
    if place_of(spec) is None:
        return lambda: _fetch_weights(spec)
    return None if folder is None or not has_weights(spec) else lambda: folder


@dataclass(frozen=True)
class _Constructor:
    """Builds a model of transformers with random float32 weights, that takes what data has and returns logits.

    Args:
        spec: What the model is called in messages.
        task: Task of its head.
        config: Its configuration.
        attention: Implementation of attention.
    """

    spec: str
    task: str
    config: Any
    attention: str

    @property
    def experts(self) -> str | None:
        """Implementation of a mixture's experts; None where there are none."""
        model_class = _model_class(self.spec, import_transformers(), self.config, self.task)
        text = self.config.get_text_config()
        is_mixture = any(getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
        can_choose = getattr(model_class, "_can_set_experts_implementation", lambda: False)
        return "batched_mm" if is_mixture and can_choose() else None

    def __call__(self) -> nn.Module:
        """Build the model; on the meta device where that is the default."""
        auto = _auto_class(self.spec, import_transformers(), self.config, self.task)
        options = {} if self.experts is None else {"experts_implementation": self.experts}
        try:
            with _quiet():
                model: nn.Module = auto.from_config(
                    copy.deepcopy(self.config), attn_implementation=self.attention, dtype=torch.float32, **options
                )
        except (TypeError, ValueError, AttributeError, LookupError, ImportError, AssertionError) as error:
            raise ConfigError(f"model {self.spec} cannot be built: {one_line(error)[:300]}; see to its configuration") from error
        model.__class__ = returning_logits(type(model), self.task)  # type: ignore[arg-type]
        return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Have transformers say nothing, and what it imports: what matters of a model is among its notes."""
    own = importlib.import_module("transformers.utils.logging")
    # Of torchao, which it imports: its enumerations are registered in two ways.
    others = logging.getLogger("torch.utils._pytree")
    before, level = own.get_verbosity(), others.level
    own.set_verbosity_error()
    others.setLevel(logging.ERROR)
    try:
        yield
    finally:
        own.set_verbosity(before)
        others.setLevel(level)


def config_json(source: ModelSource, classes: Sequence[str], targets: str) -> str:
    """Return the text of `config.json` for a trained model.

    Args:
        source: Model of transformers.
        classes: Names of the classes of its data; none where they have none.
        targets: Kind of its targets (`Targets.kind`), by which transformers takes loss and probabilities.
    """
    facts = source.transformers
    assert facts is not None
    config = copy.deepcopy(facts.config)
    config.get_text_config().use_cache = facts.text_uses_cache
    config.architectures, config.dtype, config.use_cache = [facts.architecture], "float32", facts.uses_cache
    if facts.task.endswith("classification") and targets in _PROBLEMS:
        config.problem_type = _PROBLEMS[targets]
    if facts.task.endswith("classification") and len(classes) == config.num_labels:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: number for number, name in enumerate(classes)}
    return str(config.to_json_string(use_diff=True))
