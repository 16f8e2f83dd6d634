"""Tasks: what a model learns to predict, by which loss, and how good it is at it."""

from lowmem_pnn.tasks.make_task import Own, make_task
from lowmem_pnn.tasks.own_loss import OwnLoss, OwnTask
from lowmem_pnn.tasks.own_metrics import OwnMetrics
from lowmem_pnn.tasks.scores import Scores
from lowmem_pnn.tasks.task import Task

__all__ = ["Own", "OwnLoss", "OwnMetrics", "OwnTask", "Scores", "Task", "make_task"]
