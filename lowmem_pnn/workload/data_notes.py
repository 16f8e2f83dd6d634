"""Notes on data: in what the samples that a run sees differ from those that its data set gives, in a line each."""

from lowmem_pnn.language.next_tokens import MovedLabels
from lowmem_pnn.samples.epochs import epochs_of
from lowmem_pnn.sources.subsets import reads_alone
from lowmem_pnn.workload.workload import Workload


def data_notes(workload: Workload) -> list[str]:
    """Return what is said of a run's samples.

    Args:
        workload: Model, data and method.
    """
    return [*workload.dataset.notes, *_label_notes(workload), *_draw_notes(workload), *_epoch_notes(workload)]


def _label_notes(workload: Workload) -> list[str]:
    """Return that labels of tokens are not taken as they are given."""
    if not any(isinstance(split, MovedLabels) for split in workload.splits.values()):
        return []
    return [
        "labels are moved by one token, as the model's own loss moves them: each token learns the next one, and the last of a row nothing"
    ]


def _draw_notes(workload: Workload) -> list[str]:
    """Return that the data set draws samples at random, and what the draws follow from."""
    if not workload.dataset.is_random:
        return []
    # A plan starts no readers, which the run will have.
    alone = not workload.config.workers and reads_alone(workload.splits["train"])
    when = "; they are read between batches, with --workers N beside them" if alone else ""
    return [
        "the data set draws training samples at random, anew in every epoch, from run seed, epoch and index (docs/data.md), and samples to "
        f"validate and test on once for all{when}"
    ]


def _epoch_notes(workload: Workload) -> list[str]:
    """Return that an epoch has other samples than each of them once."""
    epochs, notes = epochs_of(workload.splits["train"]), []
    if epochs is None:
        return []
    if (sampler := epochs.sampler) is not None:
        notes.append(
            f"samples of an epoch are drawn by the loader's {sampler.name}, {sampler.length:,} of {len(epochs.base):,}, from run seed and epoch "
            "(docs/data.md)"
        )
    if left := epochs.left_out:
        same = (
            "" if workload.reads_anew else "; partitions that learn from kept activations leave out the same ones in every epoch"
        )
        notes.append(
            f"the last {left:,} of the {left + len(epochs):,} training samples of an epoch are no whole batch, and left out (--drop-last){same}"
        )
    return notes
