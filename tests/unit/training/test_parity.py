"""Parity before training: equal models pass, others are refused by what differs, and nothing is changed on the way."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.exact_runs import KINDS
from helpers.plainloops import built
from helpers.small_networks import Attending, biased_tokens, small_conv, small_gpt, small_mlp, tokens, vectors
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import CaptureError
from lowmem_pnn.memory.process_meter import ProcessMemoryMeter, private_bytes
from lowmem_pnn.model.python_state import Snapshot
from lowmem_pnn.training.observed import Observed, differences
from lowmem_pnn.training.parity import compare, layers_of
from lowmem_pnn.workload import Workload, make_workload
from lowmem_pnn.workload.inputs import python_inputs
from lowmem_pnn.zoo.deferred_init import file_backed


def workload_of(build: Callable[[], nn.Module], data: Any, **options: Any) -> Workload:
    config = configure(
        max_gpu_mem="400MB", model="python:model", data="python:data", method="exact", **{"batch_size": 10, **options}
    )
    return make_workload(config, *python_inputs(build, data, None, None)(config), torch.device("cpu"))


def refuse_to_say(text: str) -> None:
    raise AssertionError(text)


@pytest.mark.parametrize("kind", ["conv", "resnet", "unet", "masked", "gpt"])  # others are compared in whole runs
def test_models_equal_their_layers_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    build, data = KINDS[kind].build, KINDS[kind].data
    assert compare(workload_of(build, data), built(build), tmp_path, refuse_to_say) == "yes"


@pytest.mark.parametrize(
    "options", [{"precision": "bf16"}, {"precision": "fp16"}, {"channels_last": True}, {"label_smoothing": 0.1}]
)
def test_they_do_in_other_precisions_and_formats(options: dict[str, Any], tmp_path: Path) -> None:
    build, data = KINDS["conv"].build, KINDS["conv"].data
    assert compare(workload_of(build, data, **options), built(build), tmp_path, refuse_to_say) == "yes"


def test_views_that_a_backward_asks_for_keep_their_gaps(tmp_path: Path) -> None:
    build = functools.partial(small_gpt, tied=True, layers=1, width=128, context=64)
    workload = workload_of(build, tokens(length=64))
    assert compare(workload, built(build), tmp_path, refuse_to_say) == "yes"


class ByItsGradient(nn.Linear):
    """Computes by a transform that takes gradients, which nobody may look on at."""

    def forward(self, x: Tensor) -> Tensor:
        slopes: Tensor = torch.func.vmap(torch.func.grad(lambda one: nn.functional.linear(one, self.weight).square().sum()))(x)
        return slopes


def test_what_takes_gradients_in_a_forward_is_compared(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 12), ByItsGradient(12, 12, bias=False), nn.Linear(12, 4))

    assert compare(workload_of(build, vectors()), built(build), tmp_path, refuse_to_say) == "yes"


class Expanded(nn.Module):
    """Its backward asks for places that are the same for all samples, an expanded tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 256), nn.Linear(256, 4)
        self.register_buffer("places", torch.arange(256)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        wide = self.first(x)[:, None].expand(-1, 256, -1) * 1.5
        return self.last(torch.gather(wide, 2, self.places.flip(2).expand(len(x), 256, -1)).mean(1))


def test_what_a_backward_asks_for_may_be_expanded(tmp_path: Path) -> None:
    assert compare(workload_of(Expanded, vectors()), built(Expanded), tmp_path, refuse_to_say) == "yes"


class Features(nn.Module):
    """Fourier features, which its constructor draws, in an order that it draws too."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 4)
        self.frequencies = torch.randn(12, 16)
        self.order = np.random.permutation(16)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(torch.sin(x @ self.frequencies)[:, torch.from_numpy(self.order)])
        return scores


def test_what_a_constructor_draws_and_keeps_is_the_same_in_layers_and_in_every_process(tmp_path: Path) -> None:
    outputs = []
    for state in (1, 2):  # of the process, in which all else is drawn
        torch.manual_seed(state)
        np.random.seed(state)
        workload = workload_of(Features, vectors())
        model = workload.build_model(0)
        assert compare(workload, model, tmp_path, refuse_to_say) == "yes"
        with layers_of(workload, model):
            outputs.append(workload.chain.eval()(vectors()[0]))
    assert torch.equal(*outputs)


def test_nothing_is_changed(tmp_path: Path) -> None:
    model, workload = built(small_conv), workload_of(small_conv, KINDS["conv"].data)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, random_state = Snapshot(model), torch.get_rng_state()
    compare(workload, model, tmp_path, refuse_to_say)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not state.changed(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(tensor.is_meta for layer in workload.chain.layers for tensor in layer.parameters().values())
    assert not list(tmp_path.iterdir())


def test_a_bias_of_attention_asks_for_no_gradient(tmp_path: Path) -> None:
    assert compare(workload_of(Attending, biased_tokens()), built(Attending), tmp_path, refuse_to_say) == "yes"


class Words(nn.Module):
    """A tied weight that outweighs all else."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40_000, 256)
        self.body = nn.Linear(256, 256)
        self.head = nn.Linear(256, 40_000, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(self.embedding(x)))
        return scores


def test_gradients_of_a_tied_weight_are_not_all_in_memory_at_once(tmp_path: Path) -> None:
    ids = torch.arange(16).view(4, 4)
    workload = workload_of(Words, (ids, ids + 1), batch_size=2)
    with file_backed(tmp_path):
        model = Words()
    meter = ProcessMemoryMeter(interval=0.0005)
    meter.start()
    meter.begin_section()
    before = private_bytes()
    assert compare(workload, model, tmp_path, refuse_to_say) == "yes"
    most = meter.peak() - before
    meter.stop()
    # Autograd would hold three: that of each use, and their sum.
    assert most < 1.8 * model.head.weight.nbytes


def flip_gradient(workload: Workload) -> None:
    """Change what the layers do with a gradient, as a hook that was lost would."""
    last = workload.chain.layers[-1].module
    last.get_submodule("4").register_full_backward_hook(lambda module, before, after: tuple(-gradient for gradient in before))


def scale_output(workload: Workload) -> None:
    workload.chain.layers[-1].module.get_submodule("4").register_forward_hook(lambda module, inputs, output: output * 1.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_gradient, r"cut into layers, the gradient of '(0|2)\.(weight|bias)' differs \(by .* of its size\)"),
        (scale_output, r"cut into layers, .* differs \(by .* of its size\); keep the module .* or give --no-compare"),
    ],
)
def test_what_differs_is_refused(change: Callable[[Workload], None], message: str, tmp_path: Path) -> None:
    workload = workload_of(small_mlp, vectors())
    change(workload)
    with pytest.raises(CaptureError, match=message):
        compare(workload, built(small_mlp), tmp_path, refuse_to_say)


def test_a_hook_that_no_tensor_tells_of_is_found(tmp_path: Path) -> None:
    model = built(small_mlp)
    node = torch.autograd.graph.get_gradient_edge(model[0].weight).node
    node.register_prehook(lambda gradients: (gradients[0] * 5,))
    model[2].weight.grad = torch.ones_like(model[2].weight)
    with pytest.raises(CaptureError, match=r"cut into layers, the gradient of '0\.weight' differs"):
        compare(workload_of(small_mlp, vectors()), model, tmp_path, refuse_to_say)
    assert torch.equal(model[2].weight.grad, torch.ones_like(model[2].weight))
    assert model[0].weight.grad is None


@pytest.mark.parametrize(("precision", "difference"), [("fp32", 2e-7), ("fp16", 3e-3), ("bf16", 2e-2)])
def test_another_order_of_sums_is_said_and_no_reason_to_stop(precision: str, difference: float, tmp_path: Path) -> None:
    workload, said = workload_of(small_mlp, vectors(), precision=precision), []
    linear = workload.chain.layers[-1].module.get_submodule("4")
    linear.register_forward_hook(lambda module, inputs, output: output * (1 + difference))
    assert compare(workload, built(small_mlp), tmp_path, said.append) == "yes"
    assert len(said) == 1
    assert "gives what it gives as a whole up to rounding" in said[0]


CALLS = itertools.count(1)


class Moody(nn.Linear):
    """Gives something else each time, by what is outside of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.tensor(float(next(CALLS)))


def test_a_model_that_never_gives_the_same_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    build = lambda: nn.Sequential(nn.Linear(12, 4), Moody(4, 4))  # noqa: E731
    assert compare(workload_of(build, vectors()), build(), tmp_path, said.append) == "no"
    assert "gives something else each time" in said[0]


def test_a_model_that_fails_on_real_samples_is_refused(tmp_path: Path) -> None:
    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, Tensor) and type(x).__name__ == "Tensor":
                raise OSError("no such device")
            return super().forward(x)

    build = lambda: nn.Sequential(nn.Linear(12, 4), Fails(4, 4))  # noqa: E731
    with pytest.raises(CaptureError, match=r"failed on 2 of its samples: OSError: no such device; mend its forward"):
        compare(workload_of(build, vectors()), build(), tmp_path, refuse_to_say)


def test_numbers_that_are_none_equal_each_other_alone() -> None:
    nan = float("nan")
    one, other = Observed({"a": nan, "b": torch.tensor([nan, 1.0])}), Observed({"a": nan, "b": torch.tensor([nan, 1.0])})
    assert differences(one, other) == {}
    other.values["b"] = torch.tensor([1.0, nan])
    assert list(differences(one, other)) == ["b"]


def test_a_write_into_a_weight_that_nobody_foresaw_is_refused_before_it_is_done(tmp_path: Path) -> None:
    class Begins(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if 1.5 < (x.abs().max() + 2).item() < 1e6:
                self.weight.data.fill_(0.5)
            return super().forward(x)

    build = lambda: nn.Sequential(nn.Linear(12, 12), Begins(12, 4))  # noqa: E731
    model = build()
    before = model[1].weight.detach().clone()
    with pytest.raises(
        CaptureError, match=r"writes into its parameter '1.weight' by values of its samples, which nobody could foresee"
    ):
        compare(workload_of(build, vectors()), model, tmp_path, refuse_to_say)
    assert torch.equal(model[1].weight, before)
