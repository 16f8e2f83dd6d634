"""Checks of tokens before training: documents that lie side by side in a row are kept apart, and every token of the data is one of the model's.

    packed      a a a b b b b --[ layers ]--> . . . B B B B      the same places and positions each time
    otherwise   c c c b b b b --[ layers ]--> . . . B B B B      must be the same bits

Weights are the constructor's, or those of files where the constructor is not run for them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowmem_pnn.device import is_out_of_memory
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.language.next_tokens import source_of
from lowmem_pnn.language.sequence_rows import LabelledRows
from lowmem_pnn.seeds import preserve_random_state
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.training.parity import layers_of
from lowmem_pnn.workload import Workload

# Training samples that are looked through for one of several documents.
_SAMPLES = 64


def are_to_be_checked(workload: Workload) -> bool:
    """Decide whether there is something to check: packed rows, or texts with classes for a model of the user's own.

    Args:
        workload: model in layers, and data.
    """
    return _is_packed(workload) or isinstance(source_of(workload.splits["train"]), LabelledRows)


def check_tokens(workload: Workload, model: nn.Module, say: Callable[[str], None]) -> None:
    """Refuse packed rows whose documents see each other, and tokens that the model does not know.

    Attention of transformers' models tells documents by their positions, and what else there may be in a model need not: other attention,
    a recurrent state, a convolution along the row.

    Args:
        workload: model in layers, and data.
        model: the model as its constructor gives it, with the values that training begins with; it stays as it is.
        say: is told where nothing could be found out.

    Raises:
        ConfigError: the model does not keep documents apart, or does not take a token of the data.
    """
    with preserve_random_state(), layers_of(workload, model), torch.no_grad():
        for layer in workload.bare.layers:
            layer.eval()
        if _is_packed(workload):
            _check_packing(workload, say)
        else:
            _check_vocabulary(workload, say)


def _is_packed(workload: Workload) -> bool:
    return "position_ids" in workload.dataset.preparation.get("input_names", ())


def _check_packing(workload: Workload, say: Callable[[str], None]) -> None:
    title = f"model {workload.source.spec}"
    if (found := _two_documents(workload)) is None:
        return
    row, place, begin = found
    otherwise = [tensor.clone() for tensor in row]
    ids = otherwise[place][0]
    first, other = ids.unique()[:2]
    ids[:begin] = torch.where(ids[:begin] == first, other, first)
    try:
        scores, others = (_run(workload, [torch.cat([one, one]) for one in inputs])[0] for inputs in (row, otherwise))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        say(f"whether {title} keeps packed documents apart was not found out: it does not fit")
        return
    if torch.equal(scores, others):
        say(f"whether {title} keeps packed documents apart was not found out: before training it says the same of all of them")
    elif not torch.equal(scores[begin:], others[begin:]):
        raise ConfigError(
            f"--pack: {title} does not keep documents in a row apart by their positions: what it says of one changes with the one before; "
            "leave --pack out"
        )


def _two_documents(workload: Workload) -> tuple[tuple[Tensor, ...], int, int] | None:
    """Return a row with two documents or more, the place of its tokens, and where the second one begins; None where there is none."""
    split, structure = workload.splits["train"], workload.dataset.structure
    assert structure is not None, "a model that takes positions takes them by name"
    places = structure.unflatten([*range(structure.num_leaves)])
    for number in range(min(len(split), _SAMPLES)):
        row, _ = split.batch([number])
        begins = (row[places["position_ids"]][0] == 0).nonzero().flatten()
        if len(begins) > 1 and len(row[places["input_ids"]].unique()) > 1:
            return tuple(row), places["input_ids"], int(begins[1])
    return None


def _check_vocabulary(workload: Workload, say: Callable[[str], None]) -> None:
    """Run the model on a row that holds the largest token of all parts: an embedding that is too small shows there, or in mid-training."""
    rows = [source for source in map(source_of, workload.splits.values()) if isinstance(source, LabelledRows)]
    split, structure = workload.splits["train"], workload.dataset.structure
    samples, _ = split.batch([0, 0])
    tensors = [samples] if isinstance(samples, Tensor) else [*samples]
    place = 0 if structure is None else structure.unflatten([*range(len(tensors))])["input_ids"]
    largest = max(source.largest_token for source in rows)
    known: list[Tensor] = tensors.copy()
    tensors[place] = tensors[place].clone()
    tensors[place][:, 0] = largest
    try:
        # What fails without that token too is no fault of it, and shows elsewhere.
        if _fault(workload, known) is None and (fault := _fault(workload, tensors)) is not None:
            raise ConfigError(
                f"model {workload.source.spec} does not take token {largest:,} of data {workload.dataset.name} ({one_line(fault)[:200]}); "
                "give the tokenizer that it was made for, or a model that knows as many"
            ) from fault
    except MemoryError:
        say(f"whether model {workload.source.spec} knows all tokens was not found out: it does not fit")


def _fault(workload: Workload, tensors: list[Tensor]) -> Exception | None:
    """Return what a forward raises; None where it goes through.

    Raises:
        MemoryError: It does not fit.
    """
    try:
        _run(workload, tensors)
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError from error
        return error
    return None


def _run(workload: Workload, tensors: list[Tensor]) -> Tensor:
    """Return the scores of samples, by the layers one after the other."""
    outputs = tuple(tensor.clone() for tensor in tensors)
    for layer in workload.bare.layers:
        outputs = layer(*outputs)
    return outputs[workload.task.output]
