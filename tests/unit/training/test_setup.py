"""Setup: products in TF32, which end with the run."""

import torch

from lowmem_pnn.training.setup import tf32_products


def test_tf32_is_the_runs_and_not_the_processs() -> None:
    before = torch.get_float32_matmul_precision()
    with tf32_products(False):
        assert torch.get_float32_matmul_precision() == before
    with tf32_products(True):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
