"""Capture: a model is cut into layers wherever a graph of its forward allows it.

    model --trace--> graph --shapes of two batch sizes, both modes--> cuts --> layers

A cut stands before an operation with weights that is no normalisation and no activation, and only where every value of its boundary is
a tensor with the batch on axis 0 that is not complex, and no later operation changes one of them in place.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from lowmem_pnn.capture.dataflow import DataFlow, trace_and_flow
from lowmem_pnn.capture.dispatch_modes import KnownValuesError
from lowmem_pnn.capture.equal_blocks import look_again
from lowmem_pnn.capture.fake_model import Alias, ModelRun, run_model
from lowmem_pnn.capture.opening import LARGE_SHARE, is_below, weight_bytes
from lowmem_pnn.capture.recomputed import unchanged_buffers
from lowmem_pnn.capture.setting import Setting
from lowmem_pnn.capture.supported import check_model, check_overrides, tensors_by_name, versions_of
from lowmem_pnn.capture.tracer import UncutError
from lowmem_pnn.capture.whole_model import WholeFlow
from lowmem_pnn.errors import CaptureError
from lowmem_pnn.model.call_form import CallForm, TensorSpec
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.model.checkpointing import checkpointing_left_out
from lowmem_pnn.model.copies import copy_structure, without_cache
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.model.modes import read_modes
from lowmem_pnn.model.parameter_hooks import ParameterHooks
from lowmem_pnn.model.precision import FULL_PRECISION, Precision
from lowmem_pnn.model.python_state import Attribute, attributes_of, is_kept

# All numbers up to 16 divide it, and all up to 1,000 that people write in tens: what is done every so many calls is done in this one.
_MANY_CALLS = 18_018_000
# What is larger than most thresholds, and not too large for a loop of Python that goes so often.
_LARGE = 1e6


def capture(
    model: nn.Module,
    specs: TensorSpec | tuple[TensorSpec, ...],
    precision: Precision = FULL_PRECISION,
    call: CallForm | None = None,
    learns_from: tuple[str, ...] = (),
    batches: Sequence[int] = (),
) -> Chain:
    """Cut a model into layers.

    Its weights are never read, so that the model may be on the meta device, or larger than memory. The model, its mode, its gradients
    and the random generators stay as they are.

    Args:
        model: module that returns a tensor, or a tuple, dict or dataclass of tensors, with the batch on axis 0 as in its inputs.
        specs: shape and type of each input, (batch, *spec.shape).
        precision: compute precision and memory format of the layers.
        call: how several inputs are handed to the model; by default by position.
        learns_from: names of outputs, the first of which that there is the loss is taken of; empty where it takes what it wants. What no
            gradient comes to is kept as it is.
        batches: numbers of samples that will occur: where a forward decides something by their number, those are looked at too.

    Returns:
        The chain, whose modules are in the mode of `model`; of one layer where the model's own forward cannot be traced.

    Raises:
        CaptureError: the model does not take such samples or does not return tensors of the same batch, its output does not depend on any
            parameter that learns, or it holds or leaves what cannot be kept.

    Example:
        >>> import torch
        >>> chain = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), TensorSpec((4,), torch.float32))
        >>> [layer.name for layer in chain.layers], [str(specs[0]) for specs in chain.boundaries]
        (['0', '1'], ['(4,) float32', '(3,) float32', '(2,) float32'])
    """
    specs = specs if isinstance(specs, tuple) else (specs,)
    form = call or CallForm.positional(len(specs))
    setting = Setting(specs, precision, 2, True, form, learns_from, tuple(batches))
    with checkpointing_left_out() as called:
        try:
            chain = _capture(model, setting)
        except CaptureError:
            if not setting.fakes_are_elsewhere:
                raise
            # There are kernels that look where tensors are before anybody can take one with values to the others.
            chain = _capture(model, replace(setting, values=False))
    for layer in (*chain.layers, *(chain.between_blocks.layers if chain.between_blocks else ())):
        layer.checkpoints = bool(called)
    return chain


def _capture(model: nn.Module, setting: Setting) -> Chain:
    check_overrides(model, [""])
    names = tensors_by_name(model)
    check_model(model, names)
    model = without_cache(model)
    modes = read_modes(model)
    if modes.frozen:
        model = _with_frozen(model, names, modes.frozen)
        names = tensors_by_name(model)
    look_again(model)
    try:
        runs = _runs(model, setting)
    except KnownValuesError:
        setting = replace(setting, values=False)
        runs = _runs(model, setting)
    asking = frozenset[str]().union(*(run.asking for run in runs))
    looked_at = [*runs, *_with_conditions(model, setting, asking)]
    looked_at += _after_many_calls(model, setting, looked_at)
    changed = zip(*((run.kept, run.left, run.cached) for run in looked_at), strict=True)
    kept, left, cached = (frozenset[Attribute]().union(*sets) for sets in changed)
    closed = {
        name: f"its forward changes its attribute {attribute!r}, whose value a trace would freeze"
        for name, attribute in kept | cached
    }
    closed |= {
        name: "it has a hook on its backward, which begins and ends with the whole of it"
        for name, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    }
    switching = frozenset[str]().union(*(run.switching for run in looked_at))
    closed |= dict.fromkeys(switching, "its forward sets whether parameters learn")
    closed |= dict.fromkeys(asking, "its forward does something by values of its input")
    flow = _flow(model, setting, runs, closed)
    plain = _plain_attributes(model, {name for name, _ in kept} | asking, kept | left | cached)
    # What a forward does by values, or by what it counts, may reach other parameters in training, or go past some.
    deciding = asking | {module for module, _ in kept}
    by_values = frozenset(name for name in names if any(not module or is_below(name, module) for module in deciding))
    reached = frozenset[str]().union(*(run.reached for run in looked_at))
    # What a model as a whole counts by whole numbers was looked at after many calls.
    values = attributes_of(model)
    unclear = asking | {module for module, attribute in kept if module or type(values.get((module, attribute))) is not int}
    idle = tuple(
        name
        for name, tensor in names.items()
        if tensor.requires_grad and name not in reached and not any(not module or is_below(name, module) for module in unclear)
    )
    if idle and all(name in idle for name, tensor in names.items() if tensor.requires_grad):
        raise CaptureError(
            f"no parameter of {type(model).__name__} gets a gradient: its output depends on none that learns; see to its forward"
        )
    hooks = {
        name: found
        for name, tensor in names.items()
        if tensor.requires_grad and name not in idle and (found := ParameterHooks.of(tensor))
    }
    aliased = {key: alias for run in looked_at for key, alias in run.aliased.items()}
    written = frozenset[str]().union(*(run.written for run in looked_at))
    averages = [name for name in written if name in idle or not names[name].requires_grad]
    moving = frozenset[str]().union(*(run.changed for run in looked_at if run.setting.training))
    detached = frozenset[str]().union(*(run.detached for run in looked_at))
    free = unchanged_buffers(model, looked_at)
    frozen = {id(names[name]): nn.Parameter(names[name].detach(), False) for name in idle}

    def cut(cuts: Sequence[int]) -> Chain:
        # A module of an nn.Sequential is called '4': its layer is named by the layer's own number, so that no layer has the number of
        # another one for a name.
        layers = []
        for number, (name, module, operations) in enumerate(flow.layers(cuts)):
            layers.append(Layer(str(number) if name.isdigit() else name, module, names, setting.precision, averages))
            layers[-1].operations = operations
        held: dict[int, list[int]] = {}
        for index, layer in enumerate(layers):
            inside = {name for name, _ in layer.module.named_modules(remove_duplicate=False)}
            layer.modes = modes.inside(inside)
            layer.kept = tuple(sorted(attribute for attribute in kept if attribute[0] in inside))
            # The model's own attributes are those of a layer where the model is one.
            own = inside if flow.is_whole else inside - {""}
            layer.left = tuple(sorted(attribute for attribute in left if attribute[0] in own))
            layer.plain = {key: value for key, value in plain.items() if key[0] in own}
            layer.cached = tuple(sorted(attribute for attribute in cached if attribute[0] in own))
            layer.may_lack_gradient = by_values.intersection(layer.parameters())
            layer.detached = detached.intersection(layer.parameters())
            layer.hooks = {name: hooks[name] for name in layer.parameters() if name in hooks}
            for name, tensor in {**layer.parameters(), **layer.buffers()}.items():
                held.setdefault(id(names[name]), []).append(index)
                if id(tensor) in frozen:
                    layer.set_tensor(name, frozen[id(tensor)])
        for name, found in hooks.items():
            if found.see_gradients and len(held[id(names[name])]) > 1:
                raise CaptureError(
                    f"parameter {name!r} of {type(model).__name__} has a hook on its gradient, and is used in "
                    f"{len(held[id(names[name])])} layers; its gradient is a sum of what these layers "
                    "give, which no hook sees here: scale or clip in the loss, or by --clip-norm"
                )
        groups: dict[int, list[str]] = {}
        for name, tensor in names.items():
            groups.setdefault(id(tensor), []).append(name)
        ranges = {tensor: (users[0], users[-1]) for tensor, users in held.items() if users[0] < users[-1] and tensor not in free}
        _say_what_is_whole(model, layers, flow.stopped)
        _refuse_aliases(model, layers, aliased)
        return Chain(
            layers=tuple(layers),
            boundaries=tuple(map(tuple, flow.boundaries(cuts))),
            ties=tuple(tuple(group) for group in groups.values() if len(group) > 1),
            tied_ranges=tuple(sorted(set(ranges.values()))),
            moving_ranges=tuple(sorted({ranges[tensor] for tensor in {id(names[name]) for name in moving} & ranges.keys()})),
            unused=tuple(name for name, tensor in names.items() if id(tensor) not in held),
            persistent=tuple(model.state_dict(keep_vars=True)),
            written=written,
            moving=moving,
            idle=idle,
            output_form=None if flow.output.is_tensor else flow.output,
            call_form=setting.form,
            versions=versions_of(model),
        )

    coarse = flow.cuts_between_blocks()
    chain = cut(flow.cuts)
    return chain if coarse == flow.cuts else replace(chain, between_blocks=cut(coarse))


def _flow(model: nn.Module, setting: Setting, runs: Sequence[ModelRun], closed: Mapping[str, str]) -> DataFlow | WholeFlow:
    """Trace a model, and find where it can be cut; where its own forward cannot be traced, it is one layer."""
    try:
        flow = trace_and_flow(model, setting, runs, closed)
        check_overrides(model, flow.opened)
    except CaptureError as error:
        if not isinstance(error, UncutError):
            raise
        return WholeFlow(model, setting, runs, error.reason)
    return flow


def _runs(model: nn.Module, setting: Setting) -> list[ModelRun]:
    """Run a model with two batch sizes, and in both modes."""
    return [run_model(model, replace(setting, batch=batch, training=mode)) for batch, mode in ((2, True), (3, True), (2, False))]


def _with_conditions(model: nn.Module, setting: Setting, asking: Collection[str]) -> list[ModelRun]:
    """Run a model that goes by values once more with all conditions true, and with other numbers: what it changes then is to be kept too."""
    settings = [replace(setting, conditions=True, number=number) for number in (0.0, _LARGE)] if asking else []
    return _as_far_as_it_runs(model, settings)


def _after_many_calls(model: nn.Module, setting: Setting, runs: Iterable[ModelRun]) -> list[ModelRun]:
    """Run a model that counts its calls as if it had been called often: what it does now and then, or later on, is to be kept too."""
    values = attributes_of(model)
    counters = [key for key in sorted({key for run in runs for key in run.kept}) if type(values.get(key)) is int]
    counts = (_MANY_CALLS - 1, _MANY_CALLS) if counters else ()  # it may look before it counts, or after
    return _as_far_as_it_runs(model, [replace(setting, counts=tuple((key, count) for key in counters)) for count in counts])


def _as_far_as_it_runs(model: nn.Module, settings: Iterable[Setting]) -> list[ModelRun]:
    """Run a model in settings in which it may not run: nobody knows whether these will occur."""
    runs = []
    for setting in settings:
        try:
            runs.append(run_model(model, setting))
        except KnownValuesError:
            pass
        except CaptureError as error:
            if error.__cause__ is None:
                raise  # it leaves what cannot be kept
    return runs


def _plain_attributes(model: nn.Module, modules: Collection[str], known: Collection[Attribute]) -> dict[Attribute, Any]:
    """Return the attributes of plain values of modules, and of those inside, but for some that are known, with copies of their values."""
    inside = {name for name, _ in model.named_modules() if any(not module or is_below(name, module) for module in modules)}
    return {
        key: deepcopy(value)
        for key, value in attributes_of(model).items()
        if key[0] in inside and key not in known and is_kept(value)
    }


def _refuse_aliases(model: nn.Module, layers: Iterable[Layer], aliased: Mapping[Attribute, Alias]) -> None:
    """Refuse forwards that read a tensor from elsewhere than where it is exchanged; a trace finds that very tensor under its name."""
    own_code = [
        {
            name
            for name, module in layer.module.named_modules()
            if type(module) is not nn.Module and not isinstance(module, fx.GraphModule)
        }
        for layer in layers
    ]
    for (name, attribute), alias in aliased.items():
        # A module that is a layer's own too gets its tensors there.
        elsewhere = [inside for inside in own_code if name in inside and not (alias.modules and inside.issuperset(alias.modules))]
        if elsewhere or not alias.is_itself:
            where = f"module {name!r} of {type(model).__name__}" if name else f"model {type(model).__name__}"
            raise CaptureError(
                f"forward of {where} reads {alias.tensor!r} from its attribute {attribute!r}, where it would stay what it is when training "
                f"puts another tensor in its place; read it by its own name, or from an nn.ParameterList"
            )


def _say_what_is_whole(model: nn.Module, layers: Iterable[Layer], stopped: Mapping[str, str]) -> None:
    """Note on layers that hold a large module which could not be opened why it is whole."""
    total = weight_bytes(model)
    for layer in layers:
        for name in stopped:
            inside = any(
                own == name and type(module) not in (nn.Module, fx.GraphModule) for own, module in layer.module.named_modules()
            )
            share = weight_bytes(model.get_submodule(name)) / max(1, total) if inside else 0.0
            if share > LARGE_SHARE:
                advice = "" if name else "; a module of its own that does so would be whole alone"
                layer.whole = f"whole: {stopped[name]}; {share:.0%} of the weights{advice}"


def _with_frozen(model: nn.Module, names: Mapping[str, Tensor], frozen: Collection[str]) -> nn.Module:
    """Return a copy of a model over the same tensors, in which some parameters are frozen."""
    return copy_structure(model, {id(names[name]): nn.Parameter(names[name].detach(), False) for name in frozen})
