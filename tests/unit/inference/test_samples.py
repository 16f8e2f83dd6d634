"""Samples to predict or to score: their targets are in a form that holds them."""

import torch

from lowmem_pnn.inference.samples import OpenPart, SamplesToPredict
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.sources.targets import TargetOptions, Targets
from lowmem_pnn.workload.data_form import DataForm


def test_masks_that_bytes_do_not_hold_keep_their_values() -> None:
    form = DataForm((TensorSpec((3, 4, 5), torch.float32),), None, Targets("mask", 2, (4, 5), torch.uint8, -100), ())
    masks = torch.ones(2, 4, 5, dtype=torch.int64)
    masks[1, 2] = -100
    split = from_torch((torch.rand(2, 3, 4, 5), masks), options=TargetOptions(ignored=-100))
    samples = SamplesToPredict([OpenPart.of_split(split, True)], form, None, "mine", None)
    assert torch.equal(samples.batch([0, 1])[1], masks)
