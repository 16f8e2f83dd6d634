"""How far an epoch is, and what was measured in it so far."""

from dataclasses import dataclass, field


@dataclass
class Tally:
    """A running mean of the loss, and a count of right answers."""

    loss_sum: float = 0.0
    num_correct: int | None = None
    num_samples: int = 0

    def add(self, mean_loss: float, num_samples: int, num_correct: int | None = None) -> None:
        """Count a batch."""
        self.loss_sum += mean_loss * num_samples
        self.num_samples += num_samples
        if num_correct is not None:
            self.num_correct = (self.num_correct or 0) + num_correct

    @property
    def loss(self) -> float:
        """The mean over all samples so far."""
        return self.loss_sum / max(1, self.num_samples)

    @property
    def accuracy(self) -> float | None:
        """The share of right answers, or None where none were counted."""
        return None if self.num_correct is None else self.num_correct / max(1, self.num_samples)


@dataclass
class EpochProgress:
    """How far a `learn` visit is: all that a resume needs to go on inside it."""

    epoch: int = 0
    batch: int = 0
    tally: Tally = field(default_factory=Tally)
