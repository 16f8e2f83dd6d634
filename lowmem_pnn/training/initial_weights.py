"""Initial weights: the constructor's own values, written to the run's weight files without the model ever being whole in memory."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor, nn

from lowmem_pnn.device import is_out_of_memory
from lowmem_pnn.errors import CheckpointError, ConfigError, LowMemError
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.model.layer import Layer, head_prefix, is_of_head
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.stores.disk import RUN_REMEDY, IoCounter
from lowmem_pnn.stores.header import TensorLayout, describe
from lowmem_pnn.stores.journal import DAMAGED
from lowmem_pnn.stores.keys import state_key, weight_key
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.workload import Workload
from lowmem_pnn.zoo.deferred_init import file_backed


def build_weights(
    workload: Workload,
    plan: Plan,
    folder: Path,
    counter: IoCounter,
    trained: Path | None = None,
    inspect: Callable[[nn.Module], None] | None = None,
    metered: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> WeightStore:
    """Build the model in mapped files, and write each partition's share of it to a weight file of its own.

    Frozen parameters of all partitions lie in one more file, which is written here, and by no commit after. Optimizer state needs no
    writing: all of it starts as zeros, and the holes of a new file read as zeros.

    Args:
        workload: source of the model, which is built after `torch.manual_seed(config.seed)`; where it has pretrained weights, these
            take the place of the constructor's values, a tensor at a time.
        plan: partitions of the model, which get a file each.
        folder: folder of the new store; the mapped files are made beside it.
        counter: counter of the bytes read and written.
        inspect: is shown the model as its constructor gives it, before anything is written; None where nobody looks.
        metered: context in which the constructor runs, such as `Device.metered`.
        trained: file of trained weights with the model's own names, whose values take the place of the constructor's.

    Returns:
        The store, sealed.

    Raises:
        CheckpointError: the trained weights lack a tensor of the model, or have it in another type or shape.
        ConfigError: so do pretrained weights.
    """
    chain = workload.chain
    layouts, constant = _layouts(workload, plan)
    folder.mkdir(parents=True, exist_ok=True)
    # The constructor's values stand for what is in no file of weights: buffers that are not in the `state_dict`.
    persistent = set(chain.persistent)
    pretrained = workload.pretrained if trained is None else None
    given = persistent if trained is not None else set() if pretrained is None else set(pretrained.names)
    with file_backed(folder) as files, metered():
        model = _build(workload, given)
    tensors: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    if inspect is not None:
        if pretrained is not None and workload.source.give_values is not None:
            # What would be compared are zeros else.
            with pretrained.reading(folder) as read:
                for name in pretrained.names.keys() & tensors.keys():
                    flat = tensors[name].detach().view(-1)
                    for start, values in read(name, (flat.dtype, tuple(tensors[name].shape))):
                        flat[start : start + len(values)].copy_(values)
                    files.evict(tensors[name])
        inspect(model)
    unused = {weight_key(name): (tensors[name].dtype, tuple(tensors[name].shape)) for name in chain.unused}
    rest: dict[str, TensorLayout] = {**constant, **unused}
    store = WeightStore.create(folder, layouts, counter, rest=rest)
    homes: list[int | str] = [*range(len(layouts)), *(["rest"] if rest else [])]
    layouts_of = {key: layout for part in (*layouts, rest) for key, layout in part.items()}
    with (
        nullcontext() if trained is None else TensorFile.open(trained, counter=counter, remedy=DAMAGED) as source,
        nullcontext() if pretrained is None else pretrained.reading(folder) as read,
    ):
        for home in homes:
            with store.writer(home) as file:  # type: ignore[arg-type]
                if isinstance(home, int):
                    _write_heads(workload, range(plan.partitions[home].start, plan.partitions[home].stop), file)
                for key in file.entries:
                    kind, _, name = key.partition("/")
                    if kind != "weight" or is_of_head(name):
                        continue
                    if source is not None and name in persistent:
                        file.copy_from(key, source, name)
                    elif pretrained is not None and name in pretrained.names:
                        assert read is not None
                        for start, values in read(name, layouts_of[key]):
                            file.write_elements(key, values, start)
                    else:
                        _check_layout(workload, name, tensors.get(name), layouts_of[key])
                        file.write_from(key, tensors[name].detach().contiguous())
                        files.evict(tensors[name])
    store.seal(homes)  # type: ignore[arg-type]
    return store


def _build(workload: Workload, given: Collection[str]) -> nn.Module:
    """Build the model, but for tensors that get their values from elsewhere, and refuse a constructor that raises."""
    try:
        return workload.build_model(workload.config.seed, given)
    except Exception as error:  # whatever a user's constructor may raise
        if isinstance(error, LowMemError) or is_out_of_memory(error):
            raise
        raise ConfigError(f"model {workload.source.spec} cannot be built: {one_line(error)}; see to its constructor") from error


def check_layouts(weights: WeightStore, workload: Workload, plan: Plan) -> None:
    """Refuse weight files that do not hold the tensors of a plan's partitions.

    Args:
        weights: store of the weight files, open.
        workload: model, data and method.
        plan: partitions of the model.

    Raises:
        CheckpointError: a partition's file has another tensor, or lacks one.
    """
    layouts, constant = _layouts(workload, plan)
    rest = weights.layout("rest")
    for number, own in enumerate(layouts):
        actual = weights.layout(number)
        # Runs of earlier versions have frozen parameters in the files of their partitions.
        expected = {**own, **{key: constant[key] for key in actual if key in constant}}
        _check_file(weights.committed_file(number), expected, actual)
        constant = {key: entry for key, entry in constant.items() if key not in actual}
    _check_file(weights.folder, constant, {key: rest[key] for key in constant if key in rest})


def _check_file(path: Path, expected: Mapping[str, TensorLayout], actual: Mapping[str, TensorLayout]) -> None:
    """Refuse a weight file whose tensors are not those that are expected."""
    differing = [key for key in {**expected, **actual} if expected.get(key) != actual.get(key)]
    if differing:
        raise CheckpointError(
            f"{str(path)!r} is not of this model: {_described(differing[0], actual)}, and the model has "
            f"{_described(differing[0], expected)}; {RUN_REMEDY}"
        )


def _layouts(workload: Workload, plan: Plan) -> tuple[list[Mapping[str, TensorLayout]], Mapping[str, TensorLayout]]:
    """Return the tensors of each partition's weight file, and those of all partitions that nothing changes."""
    chain = workload.chain
    layouts: list[Mapping[str, TensorLayout]] = []
    constant: dict[str, TensorLayout] = {}
    for number, part in enumerate(plan.partitions):
        layers = chain.layers[part.start : part.stop]
        layout = partition_layout(chain, layers, workload.optimizer(number))
        frozen = {weight_key(name) for name in constant_names(chain, layers)}
        constant |= {key: entry for key, entry in layout.items() if key in frozen}
        # A weight that several partitions share is at home with the first of them.
        own = {key: entry for key, entry in layout.items() if key not in frozen}
        layouts.append({key: entry for key, entry in own.items() if not any(key in before for before in layouts)})
    return layouts, constant


def _described(key: str, layout: Mapping[str, TensorLayout]) -> str:
    return f"{key!r} as {describe(*layout[key])}" if key in layout else f"no {key!r}"


def _write_heads(workload: Workload, layers: range, file: TensorFile) -> None:
    """Write the initial values of auxiliary heads, one head at a time."""
    for number in layers:
        head = workload.head(number)
        for name, tensor in (head.state_dict() if head is not None else {}).items():
            file.write_from(weight_key(head_prefix(number) + name), tensor.contiguous())


def _check_layout(workload: Workload, name: str, tensor: Tensor | None, wanted: TensorLayout) -> None:
    """Refuse a factory that builds another model each time: the model was cut after another call than this one."""
    built = None if tensor is None else (tensor.dtype, tuple(tensor.shape))
    if built != wanted:
        raise ConfigError(
            f"model {workload.source.spec} is another one each time it is built: {name} is now {built or 'missing'}, and was {wanted}; "
            "make its factory give the same shapes every time"
        )


def constant_names(chain: Chain, layers: tuple[Layer, ...]) -> set[str]:
    """Return the names of the frozen parameters of layers that no forward changes either: their values stay as they are.

    Args:
        chain: the model.
        layers: layers of it.
    """
    return {
        chain.owner_of(alias)
        for layer in layers
        for alias, tensor in layer.parameters().items()
        if not tensor.requires_grad and alias not in chain.written
    }


def partition_layout(chain: Chain, layers: tuple[Layer, ...], optimizer: OptimizerSpec) -> Mapping[str, TensorLayout]:
    """Return the tensors of a partition in weight files: weights, buffers and optimizer state, each tensor once.

    Args:
        chain: the model.
        layers: layers of the partition.
        optimizer: optimizer of the partition.
    """
    layout: dict[str, TensorLayout] = {}
    for layer in layers:
        for alias, tensor in (*layer.parameters().items(), *layer.buffers().items()):
            name = chain.owner_of(alias)
            layout[weight_key(name)] = (tensor.dtype, tuple(tensor.shape))
            if tensor.requires_grad:
                layout |= {state_key(name, state): entry for state, entry in optimizer.layout(tensor).items()}
    return layout
