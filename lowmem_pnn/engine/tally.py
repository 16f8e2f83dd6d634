"""How far an epoch is, and what was measured in it so far."""

from dataclasses import dataclass, field

from torch import Tensor

from lowmem_pnn.methods import Objective


@dataclass
class Tally:
    """A running mean of the loss, and a count of right answers."""

    loss_sum: float = 0.0
    num_correct: int | None = None
    num_samples: int = 0
    """Samples that were measured."""
    count: float = 0
    """What the mean loss is over: samples, or what else counts in it, such as labels of tokens that are not ignored."""
    num_answers: int = 0
    """How many answers were right or wrong."""

    @classmethod
    def of(cls, objective: Objective, outputs: tuple[Tensor, ...], labels: Tensor, *, answers: bool) -> "Tally":
        """Measure a micro-batch.

        Args:
            objective: what the outputs are measured by.
            outputs: outputs, (B, ...), on the device.
            labels: targets, (B, ...), on the device.
            answers: whether right answers are counted too.
        """
        tally = cls()
        if count := objective.count(labels):
            tally.add(float(objective.loss(outputs, labels)), len(labels), count)
        if answers and (counted := objective.num_correct(outputs, labels)) is not None:
            tally.num_correct, tally.num_answers = counted
        return tally

    def add(self, mean_loss: float, num_samples: int, count: float) -> None:
        """Count a batch.

        Args:
            mean_loss: its mean loss.
            num_samples: its samples.
            count: what the mean is over.
        """
        self.loss_sum += mean_loss * count
        self.num_samples += num_samples
        self.count += count

    def merge(self, other: "Tally") -> None:
        """Count what another one has counted."""
        self.loss_sum += other.loss_sum
        self.num_samples += other.num_samples
        self.count += other.count
        if other.num_correct is not None:
            self.num_correct = (self.num_correct or 0) + other.num_correct
            self.num_answers = self.num_answers + other.num_answers

    @property
    def loss(self) -> float | None:
        """The mean over all that counted so far, or None where nothing did."""
        return self.loss_sum / self.count if self.count else None

    @property
    def accuracy(self) -> float | None:
        """The share of right answers, or None where none were counted."""
        return None if self.num_correct is None or not self.num_answers else self.num_correct / self.num_answers


@dataclass
class EpochProgress:
    """How far a `learn` visit or a sweep is: all that a resume needs to go on inside it. Of an `emit` visit, whether it is over."""

    epoch: int = 0
    batch: int = 0
    tally: Tally = field(default_factory=Tally)
