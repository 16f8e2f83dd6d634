"""Layout of shards: how many samples a shard holds."""

import pytest
import torch

from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores.shard_layout import resident_bytes, samples_per_shard


@pytest.mark.parametrize(("sample_bytes", "samples_that_fit", "expected"), [
    (65536, 63, 63), (12544, 334, 320), (12544, 60, 60), (12, 4095, 4095), (12, 4096, 4096), (12, 5000, 4096), (4096, 1, 1),
])  # fmt: skip
def test_shards_fill_whole_pages_where_that_costs_little(sample_bytes, samples_that_fit, expected):
    specs = (TensorSpec((sample_bytes,), torch.uint8),)
    shard_bytes = samples_that_fit * resident_bytes(specs, 1)
    assert samples_per_shard(specs, 1 << 20, shard_bytes) == expected
    assert samples_per_shard(specs, 60, shard_bytes) == min(60, samples_that_fit), "a single shard is as it is"
