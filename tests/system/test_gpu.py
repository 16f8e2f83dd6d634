"""On an NVIDIA GPU: runs within the budget, copies beside the computing, stores and optimizers on its tensors."""

import pytest
import torch

from helpers.activation_stores import SAMPLE_BYTES, SPECS, read, samples
from helpers.tensors import bits
from lowmem_pnn.stores.activation_writer import ActivationWriter
from lowmem_pnn.stores.activations import ActivationStore


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tensors_on_the_gpu_are_appended(tmp_path, pool):
    tensors, labels = samples(SPECS, 20)
    with ActivationWriter(tmp_path / "a", SPECS, 20, 4 * SAMPLE_BYTES, pool) as writer:
        writer.append(tuple(tensor.cuda() for tensor in tensors), labels)
    [(back, _)] = read(ActivationStore.open(tmp_path / "a"), 20, pool)
    assert [bits(tensor) for tensor in back] == [bits(tensor) for tensor in tensors]
