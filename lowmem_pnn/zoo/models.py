"""Models by name: `mlp:`, `gpt:`, `cifar-...`, torchvision's, timm's, `hf:`, and users' factories, as constructors to call later."""

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from lowmem_pnn.errors import ConfigError, LowMemError
from lowmem_pnn.sources.imports import did_you_mean, import_torchvision, load_factory, one_line
from lowmem_pnn.sources.preprocessing import InputForm
from lowmem_pnn.zoo.cifar_models import CIFAR_MODELS, CifarShape, make_cifar
from lowmem_pnn.zoo.deferred_init import skeleton
from lowmem_pnn.zoo.gpt_model import BYTE_VOCABULARY, make_gpt, parse_gpt
from lowmem_pnn.zoo.library_models import (
    timm_builder,
    timm_image_stats,
    timm_weights,
    torchvision_files,
    torchvision_image_stats,
    torchvision_weights,
)
from lowmem_pnn.zoo.model_source import ModelSource, folder_name
from lowmem_pnn.zoo.transformers_models import find_transformers_model

# Bytes of a tensor, and of what training keeps with it, are counted in 64 bits.
_MOST_VALUES = 2**56

_FORMS = (
    f"mlp:WIDTH-WIDTH-..., gpt:layers=N,width=N,..., {', '.join(CIFAR_MODELS)}, a torchvision classifier such as resnet18, "
    "timm:NAME, hf:DIR, package.module:factory or file.py:factory"
)
# Keyword arguments that some torchvision builders take out before they call the class, which lists them as required.
_POPPED = frozenset({"dropout", "image_size", "input_size"})
# GoogLeNet and Inception return a tuple with their auxiliary classifiers, and warn when init_weights is left to them.
_AUXILIARY = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}
# They bring ImageNet's normalisation back to the one of their own weights, which torchvision turns on where it loads these.
_TRANSFORM = "transform_input"


def find_model(
    spec: str, arguments: Mapping[str, Any], num_classes: int | None, task: str = "auto", weights: str | None = None
) -> ModelSource:
    """Find the model that a text names.

    Nothing large is built: a torchvision model with arguments is tried on the meta device.

    Args:
        spec: Name of a model: `mlp:784-80-47` (widths, ReLU after every layer but the last), `gpt:layers=12,width=768` (a decoder,
            see `gpt.py` for all sizes), `cifar-resnet18` and others of `cifar.py`, a torchvision classifier, `timm:resnet18`,
            `hf:DIR` (see `transformers_models.py`), `package.module:factory` or `path/to/file.py:factory`.
        arguments: Keyword arguments of the constructor.
        num_classes: Number of classes of the data set: the default of `cifar-` and torchvision models, and the number of tokens
            of a gpt. None where the number is not known.
        task: What `--task` says, of which `hf:` models take their head.
        weights: What `--weights` says, where training begins, or began, with pretrained weights: GoogLeNet and Inception treat their
            inputs accordingly.

    Returns:
        The model's source.

    Raises:
        ConfigError: There is no such model, or it does not take these arguments.

    Example:
        >>> find_model("mlp:784-80-47", {}, 47).build()
        Sequential(
          (0): Linear(in_features=784, out_features=80, bias=True)
          (1): ReLU()
          (2): Linear(in_features=80, out_features=47, bias=True)
        )
    """
    if spec == "mlp" or spec.startswith("mlp:"):
        return _mlp(spec, arguments, num_classes)
    if spec == "gpt" or spec.startswith("gpt:"):
        return _gpt(spec, arguments, num_classes)
    if spec.partition(":")[0] in CIFAR_MODELS:
        return _cifar(spec, arguments, num_classes)
    if spec.startswith("timm:"):
        return _timm(spec, arguments, num_classes)
    if spec.partition(":")[0] == "hf":
        return find_transformers_model(spec, arguments, num_classes, task)
    if ":" in spec:
        return _factory(spec, arguments, num_classes)
    if spec.endswith(".py"):
        raise ConfigError(f"model {spec!r} names a file but no function in it; write {spec}:FACTORY")
    return _torchvision(spec, arguments, num_classes, weights)


def _mlp(spec: str, arguments: Mapping[str, Any], num_classes: int | None) -> ModelSource:
    """Return the source of a multi-layer perceptron, from the widths in its name."""
    if arguments:
        names = ", ".join(map(repr, arguments))
        raise ConfigError(
            f"model {spec!r} takes no arguments, but {names} was given; all of an mlp is in its widths, mlp:64-256-10"
        )
    texts = spec.removeprefix("mlp:").split("-")
    if len(texts) < 2 or not all(re.fullmatch(r"[0-9]+", text, re.ASCII) and int(text) > 0 for text in texts):
        raise ConfigError(
            f"{spec!r} is not an mlp; write two or more positive widths, input first and classes last: mlp:784-80-47"
        )
    widths = [int(text) for text in texts]
    for width_in, width_out in pairwise(widths):
        if width_in * width_out > _MOST_VALUES:
            raise ConfigError(f"model {spec!r}: a layer of {width_in} x {width_out} values is more than a tensor can hold")
    if num_classes is not None and widths[-1] < num_classes:
        raise ConfigError(
            f"model {spec!r} ends in {widths[-1]} outputs, but the data set has {num_classes} classes; "
            f"write mlp:{'-'.join(map(str, [*widths[:-1], num_classes]))}"
        )

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return ModelSource(folder_name("mlp-" + "-".join(map(str, widths))), spec, build, "flat")


def _gpt(spec: str, arguments: Mapping[str, Any], num_classes: int | None) -> ModelSource:
    """Return the source of a decoder, from the sizes in its name, for as many tokens as the data set has."""
    if arguments:
        names = ", ".join(map(repr, arguments))
        name, value = next(iter(arguments.items()))
        raise ConfigError(
            f"model {spec!r} takes no --model-arg, but {names} was given; all of a gpt is in its name: "
            f"{spec.rstrip(':')}{',' if '=' in spec else ':'}{name}={value}"
        )
    shape = parse_gpt(spec)
    vocabulary = BYTE_VOCABULARY if num_classes is None else num_classes
    return ModelSource(f"gpt-{shape.layers}x{shape.width}", spec, make_gpt(shape, vocabulary), "any", shape.context)


def _cifar(spec: str, arguments: Mapping[str, Any], num_classes: int | None) -> ModelSource:
    """Return the source of a network for small images, with a score for each class of the data set."""
    name, colon, _ = spec.partition(":")
    if colon:
        raise ConfigError(f"there is no model {spec!r}; write --model {name}, and, for example, --model-arg width=0.5")
    _check_arguments(spec, CifarShape, arguments, num_classes)
    _check_num_classes(spec, arguments, num_classes)
    known = {} if num_classes is None else {"num_classes": num_classes}
    shape = CifarShape(**{**known, **arguments})
    return ModelSource(spec, spec, make_cifar(spec, shape), "image3" if shape.in_channels == 3 else "any")


def _torchvision(spec: str, arguments: Mapping[str, Any], num_classes: int | None, weights: str | None) -> ModelSource:
    """Return the source of one of torchvision's classifiers, with random weights."""
    models = import_torchvision("models")
    known = models.list_models(module=models)
    if spec not in known:
        raise ConfigError(_unknown(spec, [*CIFAR_MODELS, *known]))
    builder = models.get_model_builder(spec)
    accepted = _torchvision_arguments(builder)
    for name, value in arguments.items():
        if name == "weights" and value is not None:
            raise ConfigError(
                f"model {spec!r}: weights={value!r} is not supported, weights are not built with the model; give --weights default, or "
                "--weights FILE"
            )
        if name not in ("weights", *accepted):
            raise ConfigError(f"model {spec!r} has no argument {name!r}{_accepted(name, accepted)}")
    settings = {**_AUXILIARY.get(spec, {}), **arguments}
    _check_num_classes(spec, settings, num_classes)
    if num_classes is not None:
        settings.setdefault("num_classes", num_classes)
    settings["weights"] = None
    notes: tuple[str, ...] = ()
    if spec in _AUXILIARY and weights is not None and _TRANSFORM not in arguments:
        settings[_TRANSFORM] = weights == "default" or Path(weights).name in torchvision_files(spec)
        notes = (_transform_note(spec, is_on=settings[_TRANSFORM]),)

    build = _library_build(spec, partial(builder, **settings), arguments)
    return ModelSource(
        spec,
        spec,
        build,
        "image3",
        default_weights=partial(torchvision_weights, spec),
        image_stats=torchvision_image_stats(spec),
        notes=notes,
    )


def _unknown(spec: str, known: list[str]) -> str:
    """Say that there is no model of a name, and what was probably meant."""
    path = Path(spec).expanduser()
    is_config = path.is_file() and path.suffix == ".json"
    if is_config or (path / "config.json").is_file():
        what = "a file" if is_config else "a folder with config.json"
        return f"model {spec!r} is {what}; write hf:{spec} for a model of transformers"
    if path.is_dir():
        return f"model {spec!r} is a folder without config.json, which hf: takes; a model is {_FORMS}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        return f"there is no model {spec!r}; write hf:{spec} for the model of that name on the hub of transformers; a model is {_FORMS}"
    return f"there is no model {spec!r}{did_you_mean(spec, known)}; a model is {_FORMS}"


def _transform_note(spec: str, *, is_on: bool) -> str:
    """Say whether a model brings its inputs into the form that torchvision's own weights were trained on."""
    if is_on:
        return f"{spec} has {_TRANSFORM}=True, as torchvision has it with its own weights: build it so to load the trained weights elsewhere"
    return (
        f"{spec} has {_TRANSFORM}=False, since these weights are not torchvision's own file; give --model-arg {_TRANSFORM}=true for weights "
        "that were trained with it"
    )


def _timm(spec: str, arguments: Mapping[str, Any], num_classes: int | None) -> ModelSource:
    """Return the source of one of timm's models, with random weights."""
    name, builder = timm_builder(spec, arguments)
    _check_num_classes(spec, arguments, num_classes)
    settings = dict(arguments)
    if num_classes is not None:
        settings.setdefault("num_classes", num_classes)
    build = _library_build(spec, partial(builder, **settings), arguments)
    form: InputForm = "image3" if settings.get("in_chans", 3) == 3 else "any"
    return ModelSource(
        folder_name(f"timm-{name}"),
        spec,
        build,
        form,
        default_weights=partial(timm_weights, name),
        image_stats=timm_image_stats(name),
    )


def _library_build(spec: str, builder: Callable[[], Any], arguments: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """Return what calls a library's builder; with arguments it is tried, without values, so that what it refuses shows now."""

    def build() -> nn.Module:
        try:
            model = builder()
        # Errors of constructors for values that they refuse. A RuntimeError may mean that memory ran out, which is handled elsewhere.
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, AssertionError) as error:
            raise ConfigError(_refused(spec, arguments, error)) from error
        assert isinstance(model, nn.Module)
        return model

    if arguments:
        try:
            skeleton(build)
        # Without values there is no memory to run out of: here a RuntimeError is about the arguments too.
        except RuntimeError as error:
            raise ConfigError(_refused(spec, arguments, error)) from error
    return build


def _torchvision_arguments(builder: Callable[..., Any]) -> list[str]:
    """Return the keyword arguments that a torchvision builder passes on to its class, in the class's order."""
    model_class = typing.get_type_hints(builder)["return"]
    own = inspect.signature(builder).parameters.values()
    passed_on = list(inspect.signature(model_class.__init__).parameters.values())[1:]
    named = [p.name for p in own if p.kind is p.KEYWORD_ONLY and p.name not in ("weights", "progress")]
    return named + [p.name for p in passed_on if p.kind is not p.VAR_KEYWORD and (p.default is not p.empty or p.name in _POPPED)]


def _factory(spec: str, arguments: Mapping[str, Any], num_classes: int | None) -> ModelSource:
    """Return the source of a model that a user's function returns."""
    factory = load_factory(spec)
    if isinstance(named := inspect.unwrap(factory), nn.Module):
        return _instance(spec, named, arguments)
    if num_classes is not None and _requires(factory, "num_classes"):
        # As torchvision's models have it from the data.
        arguments = {"num_classes": num_classes, **arguments}
    _check_arguments(spec, factory, arguments, num_classes)
    _check_num_classes(spec, arguments, num_classes)
    location, _, name = spec.rpartition(":")
    stem = Path(location).stem if location.endswith(".py") else location

    def build() -> nn.Module:
        try:
            model = factory(**arguments)
        # As for torchvision; a RuntimeError or an OSError of the user's code goes up as it is, with its traceback.
        except LowMemError:
            raise
        except (TypeError, ValueError, AttributeError, LookupError, NameError, ImportError, ArithmeticError) as error:
            raise ConfigError(_refused(spec, arguments, error)) from error
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"model {spec!r}: {name}() returned a value of type {type(model).__name__}; it must return a torch.nn.Module"
            )
        return model

    return ModelSource(folder_name(f"{stem}-{name}"), spec, build, "any")


def _requires(factory: Callable[..., Any], name: str) -> bool:
    """Return whether a factory cannot be called without a keyword argument."""
    try:
        parameter = inspect.signature(factory).parameters.get(name)
    except (TypeError, ValueError):  # some callables of C have none
        return False
    return parameter is not None and parameter.default is parameter.empty and parameter.kind in (
        parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY,
    )  # fmt: skip


def _instance(spec: str, model: nn.Module, arguments: Mapping[str, Any]) -> ModelSource:
    """Return the source of a model that a user's file has built already."""
    if arguments:
        raise ConfigError(
            f"model {spec!r} is built already, and takes no argument {next(iter(arguments))!r}; name the function or class that builds it"
        )
    location, _, name = spec.rpartition(":")
    stem = Path(location).stem if location.endswith(".py") else location
    return ModelSource(folder_name(f"{stem}-{name}"), spec, lambda: model, "any")


def _check_arguments(spec: str, factory: Callable[..., Any], arguments: Mapping[str, Any], num_classes: int | None) -> None:
    """Raise if a factory does not take an argument, or needs another one, before the factory runs."""
    try:
        parameters = inspect.signature(factory).parameters
    # Callables written in C may have no signature; the call itself will show.
    except (TypeError, ValueError):
        return
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if positional:
        raise ConfigError(f"model {spec!r} takes {positional[0]!r} by position only; make it a keyword argument")
    named = {p.name: p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in arguments:
            if name not in named:
                raise ConfigError(f"model {spec!r} has no argument {name!r}{_accepted(name, list(named))}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in arguments:
            value = num_classes if name == "num_classes" and num_classes is not None else "VALUE"
            raise ConfigError(f"model {spec!r} needs the argument {name!r}; give --model-arg {name}={value}")


def _check_num_classes(spec: str, arguments: Mapping[str, Any], num_classes: int | None) -> None:
    """Raise if a classifier has fewer outputs than the data set has classes."""
    given = arguments.get("num_classes")
    if num_classes is not None and type(given) is int and given < num_classes:
        raise ConfigError(
            f"model {spec!r}: num_classes={given}, but the data set has {num_classes} classes; give num_classes={num_classes}"
        )


def _accepted(name: str, accepted: list[str]) -> str:
    """Return the end of a message about an unknown argument."""
    if not accepted:
        return "; it takes none"
    guess = did_you_mean(name, accepted)
    return f"{guess if 'did you mean' in guess else ''}; it accepts: {', '.join(accepted)}"


def _refused(spec: str, arguments: Mapping[str, Any], error: Exception) -> str:
    """Return the message for a constructor that raised."""
    twice = re.search(r"multiple values for (?:keyword )?argument '(\w+)'", str(error))
    if twice:
        return f"model {spec!r} sets {twice[1]!r} itself; leave that argument out or take another model"
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items()) or "no arguments"
    return f"model {spec!r} cannot be built with {given}: {one_line(error)}; change the arguments or the constructor"
