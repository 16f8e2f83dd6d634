"""Vocabulary tiles: cross entropy over a wide last layer, some classes at a time: no gradient of its weight is there as a whole.

    rows (N, features) stay; the weight goes by in tiles of classes, twice
    first     scores of a tile --> highest score, sum of exponentials, and the target's score of each row
    second    scores of a tile --> their gradient --> added to the gradient of the rows
                                                  --> gradient of the tile, complete for these rows: handed on, and forgotten

One matrix product in four is done twice for it. Sums over classes are those of tiles, so that they are rounded otherwise than in one piece.
The sum of exponentials is moved along with the highest score, as in Milakov and Gimelshein 2018 (arXiv 1805.02867), algorithm 3.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Write = Callable[[int, Tensor], None]
"""Takes the gradient of some rows of the weight, from a row on; the memory is used again when it returns."""


def work_bytes(rows: int, features: int, tile: int) -> int:
    """Return the memory that `backward_by_tiles` takes beside its arguments, in bytes.

    Args:
        rows: number of rows N.
        features: features of each.
        tile: classes at a time.
    """
    # Per row: six numbers in float32, two class numbers and two truth values, and as many again while they are computed.
    return 4 * tile * (rows + features) + 2 * rows * (6 * 4 + 2 * 8 + 2)


def backward_by_tiles(
    rows: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tile: int,
    ignored: int,
    smoothing: float = 0.0,
    gradient: Tensor | None = None,
    bias_gradient: Tensor | None = None,
    write: Write | None = None,
) -> float:
    """Return the mean cross entropy of a linear layer's scores, and go back from it, as `nn.CrossEntropyLoss` does.

    Args:
        rows: inputs of the layer, (N, features), in float32.
        targets: class numbers (N,), int64.
        weight: weight of the layer, (classes, features).
        bias: bias of the layer, (classes,).
        tile: classes at a time.
        ignored: class number of rows that do not count.
        smoothing: smoothing of the labels, in [0, 1].
        gradient: the gradient of the rows is added to it, (N, features); None where none is wanted.
        bias_gradient: likewise of the bias.
        write: takes the gradient of the weight, tile by tile; None where none is wanted.

    Returns:
        The mean over the rows that count, 0 where none does. Where it is not finite, there are no gradients.

    Raises:
        IndexError: a target is no class.
    """
    classes = len(weight)
    counts = targets != ignored
    right = targets.masked_fill(~counts, 0)
    if bool(((right < 0) | (right >= classes)).any()):
        wrong = int(right[(right < 0) | (right >= classes)][0])
        raise IndexError(f"Target {wrong} is out of bounds.")
    scores_memory = rows.new_empty(min(tile, classes) * len(rows))

    def tiles() -> Iterator[tuple[int, int, Tensor]]:
        for begin in range(0, classes, tile):
            end = min(begin + tile, classes)
            scores = scores_memory[: len(rows) * (end - begin)].view(len(rows), end - begin)
            torch.mm(rows, weight[begin:end].t(), out=scores)
            if bias is not None:
                scores += bias[begin:end]
            yield begin, end, scores

    highest, total = rows.new_full((len(rows),), -math.inf), rows.new_zeros(len(rows))
    at_target, all_scores = rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
    for begin, end, scores in tiles():
        own = ((right >= begin) & (right < end)).nonzero().squeeze(1)
        at_target[own] = scores[own, right[own] - begin]
        if smoothing:
            all_scores += scores.sum(1)
        higher = torch.maximum(highest, scores.amax(1))
        total.mul_(highest.sub_(higher).exp_()).add_(scores.sub_(higher[:, None]).exp_().sum(1))
        highest = higher
    log_sum = highest + total.log_()
    losses = log_sum - (1 - smoothing) * at_target
    if smoothing:
        losses -= smoothing / classes * all_scores
    number = int(counts.sum())
    loss = float(losses[counts].sum(dtype=torch.float64)) / max(1, number)
    if not math.isfinite(loss) or (gradient is None and bias_gradient is None and write is None):
        return loss
    shares = counts.to(rows.dtype).div_(max(1, number))
    tile_memory = None if write is None else rows.new_empty(min(tile, classes) * rows.shape[1])
    for begin, end, scores in tiles():
        scores.sub_(log_sum[:, None]).exp_()
        if smoothing:
            scores -= smoothing / classes
        own = ((right >= begin) & (right < end)).nonzero().squeeze(1)
        scores[own, right[own] - begin] -= 1 - smoothing
        scores.mul_(shares[:, None])
        if gradient is not None:
            gradient.addmm_(scores, weight[begin:end])
        if bias_gradient is not None:
            bias_gradient[begin:end] += scores.sum(0)
        if write is not None and tile_memory is not None:
            of_tile = tile_memory[: (end - begin) * rows.shape[1]].view(end - begin, rows.shape[1])
            write(begin, torch.mm(scores.t(), rows, out=of_tile))
    return loss
