"""Parity before training: the user's model as it is, and the same model in layers, on a few samples of the training data.

    as it is     x --[ model ]--> scores --> loss --backward--> gradients        tensors saved for backward lie in a file
    in layers    x --[ layer 0 ]--[ layer 1 ]-- ... --> loss                     forward, layer by layer
                     each layer forward once more, from the last one, and back   as in exact training

Outputs, loss, gradients of all parameters, buffers, and Python state must be the same bits, in train mode, and outputs in eval mode.
Weights are the constructor's, also where training begins with pretrained ones; of models of transformers, whose constructors are not run for
what files have, these. They are in mapped files, so that neither side needs memory for them, and what is large of a backward goes to files
too. What is changed on the way is a copy, or restored; a parameter that nobody knew a forward to write into is refused before it is written.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowmem_pnn.capture.dispatch_modes import tensors_in
from lowmem_pnn.capture.supported import check_tensors_stay
from lowmem_pnn.device import is_out_of_memory, why_it_failed
from lowmem_pnn.errors import CaptureError, LowMemError
from lowmem_pnn.model.call_form import OutputForm, ask_for_gradients
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.model.checkpointing import checkpointing_left_out
from lowmem_pnn.model.copies import copy_structure, set_mode
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.model.parameter_hooks import ParameterHooks
from lowmem_pnn.model.python_state import Snapshot, read_changed, read_state
from lowmem_pnn.seeds import preserve_random_state, seed_generators, seed_of
from lowmem_pnn.training.observed import Observed, Spilled, Unwritten, differences, refuses_hooks
from lowmem_pnn.training.outer_state import OuterState
from lowmem_pnn.workload import Workload
from lowmem_pnn.zoo.deferred_init import FileBacked

_SAMPLES = 2
# Results of so many bytes go to a file as soon as a backward has them: gradients of a tied weight, one for each use, would add up.
_MOVED_BYTES = 1 << 22
# Relative difference of two sums up to which they may be one sum in another order, by the type of what is summed.
_ROUNDING = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1}


def compare(workload: Workload, model: nn.Module, folder: Path, say: Callable[[str], None]) -> Literal["yes", "no"]:
    """Compare a model with its layers, before anything is trained.

    Args:
        workload: model in layers, and data.
        model: the model as its constructor gives it, with values; it stays as it is.
        folder: folder of the file for what is saved for backward.
        say: is told what differs by rounding, or cannot be compared.

    Returns:
        `yes` where both gave the same, be it up to rounding, which is said; `no` where they could not be compared, which is said too.

    Raises:
        CaptureError: they differ, and training in layers would not be training the model; or the model does not run.
    """
    title, count = f"model {workload.source.spec}", _SAMPLES
    if len(workload.splits["train"]) < count:
        say(f"{title} was not compared with its layers: there are fewer than {count} training samples")
        return "no"
    batch = workload.splits["train"].batch(range(count))
    try:
        outer = OuterState(model)
        spills = True
        try:
            theirs = _observe_model(workload, model, batch, folder)
        except RuntimeError as error:
            if not refuses_hooks(error):
                raise
            spills = False
            theirs = _observe_model(workload, model, batch, folder, spills=False)
        if changed := outer.changed(model):
            # What is computed once, at the first run, is a cache.
            outer = OuterState(model)
            _observe_model(workload, model, batch, folder, spills=spills)
            if changed := [place for place in outer.changed(model) if place in changed]:
                raise CaptureError(
                    f"{title} changes {changed[0]} whenever it runs, which is outside of its modules: it is not kept with a run, and "
                    "would change more than once a batch; keep it in a buffer or an attribute of a module, or give --no-compare to train "
                    "the layers as they are"
                )
        with preserve_random_state():
            ours = _observe_layers(workload, model, batch, folder, spills=spills)
        different = differences(theirs, ours)
        if different and differences(theirs, _observe_model(workload, model, batch, folder, spills=spills)):
            say(
                f"{title} gives something else each time it is run on the same samples, and could not be compared with its layers"
            )
            return "no"
    except Exception as error:
        if isinstance(error, LowMemError):
            raise
        if is_out_of_memory(error):
            say(f"{title} does not fit as a whole, be it for {count} samples, and could not be compared with its layers")
            return "no"
        raise CaptureError(f"{title} failed on {count} of its samples: {why_it_failed(error)}") from error
    if not different:
        return "yes"
    what, size = max(different.items(), key=lambda item: item[1])
    if size <= _ROUNDING[workload.config.precision]:
        say(f"{title} in layers gives what it gives as a whole up to rounding: {what} differs by {size:.1g} of its size")
        return "yes"
    raise CaptureError(
        f"{title} would be trained otherwise than it is: cut into layers, {what} differs ({_size_text(size)}); keep the module that it "
        "comes from free of state that is no buffer, or give --no-compare to train the layers as they are"
    )


def _observe_model(
    workload: Workload, model: nn.Module, batch: tuple[Any, Any], folder: Path, *, spills: bool = True
) -> Observed:
    """Run the user's own model, forward and backward in train mode, and forward in eval mode."""
    # Without the model's own checkpointing, by which a BatchNorm counts each batch twice.
    with _parameters_kept(model), preserve_random_state(), checkpointing_left_out():
        return _observe_copy(workload, model, batch, folder, spills=spills)


def _observe_copy(workload: Workload, model: nn.Module, batch: tuple[Any, Any], folder: Path, *, spills: bool) -> Observed:
    observed, chain = Observed(), workload.bare
    twin = _copied(model, chain.written)
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    names = {id(parameters[name]): chain.owner_of(name) for name in parameters}
    precision = chain.layers[0].precision
    before = Snapshot(twin)
    set_mode(twin, True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _seed(workload)
        moved = FileBacked(Path(scratch), _MOVED_BYTES)
        spilled = Spilled(Path(scratch), [*twin.parameters(), *twin.buffers(), *_inputs(batch), *tensors_in(batch[1])])
        with spilled.keeping() if spills else nullcontext():
            with precision.autocast(), Unwritten(workload, parameters):
                outputs = run_model(twin, chain, batch)
            loss = workload.task.loss(outputs, batch[1], training=True)
            handles = [
                parameter.register_post_accumulate_grad_hook(lambda tensor: observed.take_gradient(names[id(tensor)], tensor))
                for parameter in {id(parameter): parameter for parameter in parameters.values()}.values()
                if parameter.requires_grad
            ]
            with moved:
                observed.values |= {**_outputs(chain, outputs, "train"), "the loss": float(loss.detach())}
                del outputs
                torch.autograd.backward(loss)
        del loss
    for handle in handles:
        handle.remove()
    check_tensors_stay(type(model).__name__, *(_persistent_buffers(one) for one in (model, twin)))
    _note_state(workload, observed, dict(twin.named_buffers()), twin, before)
    set_mode(twin, False)
    _seed(workload)  # what is drawn in eval mode too
    with torch.no_grad(), precision.autocast(), Unwritten(workload, parameters):
        outputs = run_model(twin, chain, batch)
    with FileBacked(folder, _MOVED_BYTES):
        observed.values |= _outputs(chain, outputs, "eval")
    return observed


def _observe_layers(workload: Workload, model: nn.Module, batch: tuple[Any, Any], folder: Path, *, spills: bool) -> Observed:
    """Run the layers of the model as exact training runs them, each layer a partition of its own."""
    chain, observed = workload.bare, Observed()
    with layers_of(workload, model) as loaded, tempfile.TemporaryDirectory(dir=folder) as scratch:
        for layer in chain.layers:
            layer.train()
        _seed(workload)
        _forward_and_back(workload, batch, loaded, observed, Path(scratch), spills=spills)
        # Names of the model's own, buffers that no layer holds included.
        buffers = {chain.owner_of(alias): tensor for layer in chain.layers for alias, tensor in layer.buffers().items()}
        _note_state(workload, observed, {name: buffers.get(chain.owner_of(name), own) for name, own in model.named_buffers()})
        for layer in chain.layers:
            layer.eval()
        _seed(workload)
        with torch.no_grad():
            tensors = _inputs(batch)
            for layer in chain.layers:
                tensors = layer(*tensors)
            with FileBacked(Path(scratch), _MOVED_BYTES):
                observed.values |= _outputs(chain, tensors, "eval")
    return observed


@contextmanager
def layers_of(workload: Workload, model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Give the layers of a workload the values of a model, until the end of the context, where they are as before.

    Inside, layers run as they are: compiled code rounds otherwise.

    Args:
        workload: model in layers, and data.
        model: the model as its constructor gives it; neither its parameters nor its buffers are changed by what layers do.

    Yields:
        The layers' parameters, by the names that they are stored under.
    """
    layers = workload.bare.layers
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    originals = [(layer, name, tensor) for layer in layers for name, tensor in _tensors_of(layer).items()]
    compiled = [layer.compiled for layer in layers]
    with workload.bare.python_state_restored():
        try:
            for layer in layers:
                layer.compiled = None
            yield _load(workload, tensors)
        finally:
            for layer, name, tensor in originals:
                layer.set_tensor(name, tensor)
            for layer, code in zip(layers, compiled, strict=True):
                layer.compiled = code


def _forward_and_back(
    workload: Workload,
    batch: tuple[Any, Any],
    loaded: Mapping[str, nn.Parameter],
    observed: Observed,
    folder: Path,
    *,
    spills: bool,
) -> None:
    layers, boundaries, owner_of = workload.bare.layers, workload.bare.boundaries, workload.bare.owner_of
    moved = FileBacked(folder, _MOVED_BYTES)
    spilled = Spilled(folder, [*loaded.values(), *_inputs(batch), *tensors_in(batch[1])])
    owners = [{owner_of(alias): parameter.requires_grad for alias, parameter in layer.parameters().items()} for layer in layers]
    first_user = {name: number for number, names in reversed([*enumerate(owners)]) for name in names}
    users = Counter(
        id(buffer) for layer in layers for buffer in {id(value): value for value in layer.buffers().values()}.values()
    )
    inputs: list[tuple[Tensor, ...]] = [_inputs(batch)]
    states: list[tuple[Tensor, Mapping[str, Any], dict[str, Tensor]]] = []
    learns = False
    for number, layer in enumerate(layers[:-1]):
        before = {name: value.clone() for name, value in workload.bare.changing(layer).items()}
        states.append((torch.get_rng_state(), layer.python_state, before))
        outputs = layer(*ask_for_gradients(map(Tensor.detach, inputs[-1]), boundaries[number], learns))
        inputs.append(tuple(tensor.detach() for tensor in outputs))
        learns = learns or any(owners[number].values())
    gradients: list[Tensor | None] = []
    for number in reversed(range(len(layers))):
        layer = layers[number]
        if number < len(layers) - 1:
            random_state, python_state, buffers = states[number]
            torch.set_rng_state(random_state)
            layer.set_python_state(python_state)
            for name, value in workload.bare.changing(layer).items():
                value.copy_(buffers[name])
        learns = any(any(names.values()) for names in owners[:number])
        leaves = ask_for_gradients(map(Tensor.detach, inputs.pop()), boundaries[number], learns)
        if number == len(layers) - 1:
            with spilled.keeping() if spills else nullcontext():
                outputs = layer(*leaves)
                after = [(value, value.clone()) for own in layers for value in own.buffers().values() if users[id(value)] > 1]
                loss = workload.task.loss(outputs, batch[1], training=True)
            with moved:
                observed.values |= {**_outputs(workload.bare, outputs, "train"), "the loss": float(loss.detach())}
                del outputs
                torch.autograd.backward(loss)
            del loss
        else:
            outputs = layer(*leaves)
            pairs = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
            pairs = [(output, gradient) for output, gradient in pairs if output.requires_grad]
            if pairs:
                with moved:
                    torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        gradients = [leaf.grad for leaf in leaves]
        for name in owners[number]:
            if loaded[name].grad is not None and first_user[name] == number:
                observed.take_gradient(name, loaded[name])
    # Such a buffer is what the whole forward made of it; a plan has its layers in one partition.
    for value, final in after:
        with torch.no_grad():
            value.copy_(final)


def _load(workload: Workload, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Give the layers the model's values: parameters that share their memory, and copies of the buffers."""
    chain = workload.bare
    loaded: dict[str, nn.Parameter] = {}
    copies: dict[str, Tensor] = {}
    for layer in chain.layers:
        for alias, shape_of in layer.parameters().items():
            name = chain.owner_of(alias)
            if name not in loaded:
                values = tensors[name].detach()
                loaded[name] = nn.Parameter(values.clone() if alias in chain.written else values, shape_of.requires_grad)
                chain.hang_hooks(name, loaded[name])
            layer.set_tensor(alias, loaded[name])
        for alias in layer.buffers():
            name = chain.owner_of(alias)
            layer.set_tensor(alias, copies.setdefault(name, tensors[name].detach().clone()))
    return loaded


def _inputs(batch: tuple[Any, Any]) -> tuple[Tensor, ...]:
    """Return copies of a batch's inputs, which a forward may change."""
    return tuple(tensor.clone() for tensor in (batch[0] if isinstance(batch[0], tuple) else (batch[0],)))


def run_model(model: nn.Module, chain: Chain, batch: tuple[Any, Any]) -> tuple[Tensor, ...]:
    """Run the user's model as it is called, and return the tensors of what it returns.

    Args:
        model: the model, or a copy of it.
        chain: the same in layers, which knows how it is called.
        batch: samples and targets; the samples are copied, for a forward may change them.
    """
    returned = chain.call_form.call(model, chain.layers[0].precision.to_memory_format(_inputs(batch)))
    return OutputForm.of(returned)[1]


def _outputs(chain: Chain, outputs: tuple[Tensor, ...], mode: str) -> dict[str, Tensor]:
    names = chain.output_form.names if chain.output_form is not None else ("",)
    return {
        f"the output {f'{name!r} ' if name else ''}in {mode} mode": tensor.detach().clone()
        for name, tensor in zip(names, outputs, strict=True)
    }


def _tensors_of(layer: Layer) -> dict[str, Tensor]:
    return {**layer.parameters(), **layer.buffers()}


def _copied(model: nn.Module, written: Collection[str]) -> nn.Module:
    """Return a copy of a model over its very parameters, with all that hangs on them, but for those that a forward changes in place."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    twins: dict[int, Tensor] = {id(buffer): buffer.detach().clone() for buffer in model.buffers()}
    for name in written:
        own = parameters[name]
        twins[id(own)] = twin = nn.Parameter(own.detach().clone(), own.requires_grad)
        if (hooks := ParameterHooks.of(own)) is not None:
            hooks.hang_on(twin)
    return copy_structure(model, twins)


@contextmanager
def _parameters_kept(model: nn.Module) -> Iterator[None]:
    """Restore the gradients of parameters, and whether they learn, at the end of the context; inside there are no gradients."""
    before = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient, learns in before:
            parameter.requires_grad_(learns).grad = gradient


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    persistent = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in model.named_buffers() if name in persistent}


def _seed(workload: Workload) -> None:
    seed_generators(seed_of(workload.config.seed, "compare"))


def _note_state(
    workload: Workload,
    observed: Observed,
    buffers: Mapping[str, Tensor],
    twin: nn.Module | None = None,
    before: Snapshot | None = None,
) -> None:
    """Note buffers and Python state after a forward; refuse Python state of the model that is not known to change."""
    chain = workload.bare
    observed.values |= {f"buffer {name!r}": buffer.detach().clone() for name, buffer in buffers.items()}
    if twin is None or before is None:
        observed.values |= {f"attribute {name!r}": value for name, value in chain.python_state.items()}
        return
    kept = [attribute for layer in chain.layers for attribute in layer.kept]
    plain = {key: value for layer in chain.layers for key, value in layer.plain.items()}
    known = {*kept, *plain, *(attribute for layer in chain.layers for attribute in layer.left)}
    for name, attribute in before.changed(twin):
        if (name, attribute) not in known and name and any(_has_module(layer, name) for layer in chain.layers):
            raise CaptureError(
                f"forward of module {name!r} of model {workload.source.spec} changes its attribute {attribute!r} with the values of its "
                "samples, which cannot be kept with a run; keep it in a buffer"
            )
    state = {**read_state(twin, kept), **read_changed(twin, plain)}
    observed.values |= {f"attribute {name!r}": value for name, value in state.items()}


def _has_module(layer: Layer, name: str) -> bool:
    return any(own == name and type(module) is not nn.Module for own, module in layer.module.named_modules())


def _size_text(size: float) -> str:
    return f"by {size:.2g} of its size" if math.isfinite(size) else "there is one on one side alone"
