"""The meta model's options: those of the first partition, with nothing that only the run's own partitions can follow."""

from typing import Any

import pytest

from lowmem_pnn.config.configure import configure
from lowmem_pnn.workload.meta_model import meta_config


@pytest.mark.parametrize(
    ("options", "field", "expected"),
    [
        ({"recovery_epochs": 2, "recompute": "always"}, "recompute", "auto"),
        ({"batch_size": (32, 64), "micro_batch": 64}, "micro_batch", 32),
        ({"batch_size": (64, 32), "micro_batch": 48}, "micro_batch", 48),
        ({"lr": (0.001, 0.01), "min_lr": 0.005, "lr_schedule": "cosine"}, "min_lr", 0.001),
        ({"weight_decay": 0.1, "no_decay": ("*norm*",)}, "no_decay", None),
        ({"lr_for": {"0.*": 0.1}}, "lr_for", {}),
    ],
)
def test_options_that_the_meta_model_cannot_follow_are_left_out(options: dict[str, Any], field: str, expected: Any) -> None:
    meta = meta_config(configure(max_gpu_mem="1GB", model="mlp:4-4", data="digits", method="incubate", partitions=2, **options))
    assert (meta.method, getattr(meta, field)) == ("backprop", expected)
