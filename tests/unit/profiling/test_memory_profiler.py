"""The profiler: exact where it can be checked by hand, never far from what real runs hold, and without a trace."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.neuroflux_layers import layers_with_heads
from helpers.small_networks import Attending
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.memory.storage_tracker import StorageTracker
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.planning.planner import partition_peak
from lowmem_pnn.profiling import fake_run
from lowmem_pnn.profiling.costs import Affine, Envelope, ties_counted_once, with_local_loss
from lowmem_pnn.profiling.memory_profiler import fit_peak, profile
from lowmem_pnn.profiling.peaks import largest_micro_batch, peak_of

CPU = torch.device("cpu")


def flat(*shape):
    return TensorSpec(shape, torch.float32)


SGD = OptimizerSpec("sgd", momentum=0.0)
ADAM = OptimizerSpec("adam")
ADAM_BY_LOOPS = OptimizerSpec("adam", fused=False)


def profile_of(model, spec, optimizer=SGD):
    return profile(capture(model, spec), optimizers=[optimizer], device=CPU)


def mlp(*widths):
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """A vision transformer in miniature."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.position = nn.Parameter(torch.zeros(1, 64, 32))
        blocks = [nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True) for _ in range(2)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.position)).mean(1))


class Skip(nn.Module):
    """Several tensors at its cuts."""

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)])
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8 * 8 * 8, 10)

    def forward(self, x):
        first = self.stem(x)
        second = self.convs[0](F.relu(first))
        third = self.convs[1](F.relu(second))
        return self.head((self.convs[2](third + first) + second).flatten(1))


def resnet():
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


@pytest.fixture
def tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the scratch memory of kernels, for comparisons with a tracker, which sees tensors alone."""
    monkeypatch.setattr(fake_run, "scratch_bytes", lambda *_: 0)


def test_a_linear_layer_by_hand():
    [first, second] = profile_of(mlp(30, 20, 10), flat(30), ADAM_BY_LOOPS).layers
    assert (second.name, second.num_params) == ("1", 210)
    assert second.weight_bytes == second.gradient_bytes == 4 * 210
    assert second.optimizer_bytes == 2 * 4 * 210
    assert second.step_bytes == 2 * 4 * 200
    assert second.buffer_bytes == 0
    assert second.kept == Affine(0, 40)  # its outputs; what it saves are its inputs
    assert second.forward_peak.at(7) == second.emit_peak.at(7) == 40 * 7
    assert second.backward_peak.at(7) == 4 * 210 + 80 * 7  # its gradients and the one that goes out
    assert (second.input_bytes, second.output_bytes) == (Affine(0, 80), Affine(0, 40))
    assert second.forward_macs == 200
    # Linear and ReLU: both outputs for a moment; the ReLU's is kept.
    assert first.forward_peak.at(5) == first.emit_peak.at(5) == 2 * 80 * 5
    assert first.kept == Affine(0, 80)
    # ReLU's gradient with the one that came in; then that one is free again, and the layer's own are there.
    assert first.backward_peak.at(1) == 4 * 620
    assert first.backward_peak.at(1000) == 80 * 1000
    # When all gradients of a layer are there, the gradient of its inputs is too, and that of its outputs is free.
    assert second.complete.at(7) == 4 * 210 + (80 - 40) * 7
    assert first.complete.at(7) == 4 * 620 - 80 * 7


@pytest.mark.usefixtures("tensors_only")
def test_the_smallest_number_of_samples_is_exact_too():
    """Moments that fall with the number of samples are followed to 1."""
    costs = profile_of(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()), flat(3, 6, 6))
    layer = costs.layers[1]
    assert layer.kept == Affine(0, 4 * 64 * 2 * 2)
    gradients, incoming, outgoing = 4 * 64 * (64 * 9 + 1), 4 * 64 * 4, 4 * 64 * 16
    # ReLU's gradient, then the convolution's: the output and the gradient that came in are no longer held then.
    for batch in (1, 5, 100):
        assert layer.backward_peak.at(batch) <= gradients + (incoming + outgoing) * batch
        assert layer.backward_peak.at(batch) >= gradients + outgoing * batch - incoming * batch


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_model_is_untouched(device):
    with torch.device(device):
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 4))
    model[3].weight.requires_grad_(False)
    model[1].eval()
    chain = capture(model, flat(6))
    modes = [module.training for layer in chain.layers for module in layer.module.modules()]
    before = {name: tensor if device == "meta" else tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = [tensor for layer in chain.layers for tensor in (*layer.parameters().values(), *layer.buffers().values())]
    torch.manual_seed(3)
    state = torch.random.get_rng_state()

    profile(chain, optimizers=[SGD, ADAM_BY_LOOPS], device=CPU)

    assert torch.equal(torch.random.get_rng_state(), state)
    after = [tensor for layer in chain.layers for tensor in (*layer.parameters().values(), *layer.buffers().values())]
    assert all(one is other for one, other in zip(tensors, after, strict=True))
    assert [module.training for layer in chain.layers for module in layer.module.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    if device == "cpu":
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_layer_of_four_terabytes_is_profiled_without_them():
    with torch.device("meta"):
        model = mlp(1_000_000, 1_000_000, 10)
    costs = profile_of(model, flat(1_000_000), ADAM)
    assert costs.layers[0].state_bytes == 16 * (10**12 + 10**6)
    assert costs.layers[0].backward_peak.at(8) == 4 * (10**12 + 10**6)


def test_frozen_weights_have_no_gradients():
    model = mlp(30, 20, 10)
    model[2].requires_grad_(False)
    [_, frozen] = profile_of(model, flat(30), ADAM_BY_LOOPS).layers
    assert (frozen.gradient_bytes, frozen.optimizer_bytes, frozen.step_bytes) == (0, 0, 0)
    assert frozen.weight_bytes == 840
    assert frozen.backward_peak.at(7) == 80 * 7


def test_a_layer_without_any_gradient_has_no_backward():
    model = mlp(30, 20, 10)
    model[0].requires_grad_(False)
    [frozen, _] = profile_of(model, flat(30)).layers
    assert frozen.backward_peak.at(64) == 0
    assert frozen.kept == Affine(0, 80)


def test_a_shared_weight_counts_once_and_forbids_the_cuts_between():
    model = mlp(8, 8, 8, 8)
    model[4].weight = model[0].weight
    costs = profile_of(model, flat(8))
    assert costs.forbidden_cuts == (1, 2)
    assert [layer.num_params for layer in costs.layers] == [72, 72, 72]
    assert [[(tie.is_first, tie.is_last, tie.num_params) for tie in layer.ties] for layer in costs.layers] == [
        [(True, False, 64)], [], [(False, True, 64)]
    ]  # fmt: skip
    once = ties_counted_once(costs.layers)
    assert [layer.num_params for layer in once] == [72, 72, 8]
    assert sum(layer.weight_bytes for layer in once) == 4 * sum(parameter.numel() for parameter in model.parameters())


def test_whole_numbers_as_input():
    model = nn.Sequential(nn.Embedding(50, 6), nn.Flatten(), nn.Linear(24, 3))
    costs = profile(capture(model, TensorSpec((4,), torch.int64)), optimizers=[SGD], device=CPU)
    assert costs.layers[0].input_bytes == Affine(0, 32)
    assert costs.layers[0].kept.at(3) >= 3 * 96
    assert costs.layers[-1].output_bytes == Affine(0, 12)


@pytest.mark.parametrize(
    ("model", "spec", "smallest"),
    [
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)), flat(6), 2),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4)), flat(3, 4, 4), 1),
        (mlp(6, 5, 4), flat(6), 1),
    ],
)
def test_the_smallest_micro_batch_is_what_batch_normalisation_accepts(model, spec, smallest):
    assert profile_of(model, spec).smallest_micro_batch == smallest


@pytest.mark.parametrize(
    ("optimizers", "words"),
    [
        ([SGD], "sgd"),
        ([OptimizerSpec("sgd"), ADAM, ADAM], "sgd with momentum, adam"),
        ([OptimizerSpec("adamw", state="int8")], "adamw with state in int8"),
    ],
)
def test_the_optimizers_are_named(optimizers, words):
    assert profile(capture(mlp(3, 2), flat(3)), optimizers=optimizers, device=CPU).optimizer == words


def test_of_several_optimizers_the_largest_is_counted():
    costs = profile(capture(mlp(30, 20, 10), flat(30)), optimizers=[SGD, ADAM_BY_LOOPS, ADAM], device=CPU)
    assert costs == dataclasses.replace(profile_of(mlp(30, 20, 10), flat(30), ADAM_BY_LOOPS), optimizer="sgd, adam")


class TokenFirst(nn.Module):
    """A parameter that is expanded to the batch leaves the first layer as a view."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        self.first, self.last = nn.Linear(6, 6), nn.Linear(12, 4)

    def forward(self, x):
        token = self.token.expand(x.shape[0], -1, -1)
        return self.last(torch.cat([token, self.first(x).unsqueeze(1)], 1).flatten(1))


def test_a_view_of_a_parameter_between_layers_counts_no_operations():
    costs = profile_of(TokenFirst(), flat(6))
    assert [layer.forward_macs for layer in costs.layers] == [6 * 6, 12 * 4]


def test_a_multiply_accumulate_is_counted_once():
    costs = profile_of(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5)), flat(3, 8, 8))
    assert [layer.forward_macs for layer in costs.layers] == [64 * 8 * 27, 8 * 64 * 5]


class OnlyInEval(nn.Linear):
    """Trains on few samples only."""

    def forward(self, x):
        if self.training and x.shape[0] > 3:
            raise ValueError("too many samples")
        return super().forward(x)


def test_a_layer_that_does_not_run_is_named():
    model = nn.Sequential(nn.Linear(4, 4), OnlyInEval(4, 2))
    with pytest.raises(ConfigError) as caught:
        profile_of(model, flat(4))
    assert str(caught.value) == (
        "layer '1' does not run forward and backward on 4 samples of (4,) float32: ValueError: too many samples; its memory "
        "cannot be foreseen, mend its forward"
    )


def test_a_backward_that_reads_weights_by_itself_is_named():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].register_full_backward_hook(lambda module, gradients, _: (gradients[0] / module.weight.norm(),))
    with pytest.raises(
        ConfigError, match=r"^the backward of layer '1' reads weights by itself, as a hook or an autograd\.Function"
    ):
        profile_of(model, flat(4))


class Adapts(nn.Linear):
    """Takes a step by its weight before it computes."""

    def forward(self, x):
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(F.linear(x, self.weight).square().mean(), self.weight, create_graph=True)
        return F.linear(x, self.weight - gradient)


def test_a_forward_that_takes_gradients_by_its_weights_is_measured():
    costs = profile_of(nn.Sequential(nn.Linear(4, 4), Adapts(4, 2, bias=False)), flat(4))
    assert costs.layers[1].forward_macs >= 2 * 4 * 2


def test_a_peak_is_exact_where_every_moment_grows_in_a_straight_line():
    lines = [Affine(100, 0), Affine(0, 30), Affine(60, -5), Affine(20, 20)]
    peak = fit_peak(*([line.at(size) for line in lines] for size in (4, 6, 64)))
    for size in (1, 2, 10, 500):
        assert peak.at(size) == Envelope(tuple(lines)).at(size)


def test_a_peak_is_not_below_what_was_measured_where_the_moments_differ():
    peak = fit_peak([40, 10], [60, 5, 3], [10_000])
    assert peak.at(4) >= 40
    assert peak.at(6) >= 60
    assert peak.at(64) >= 10_000


def measured_peak(chain, start, stop, micro_batch, batch, smallest):
    """What a real batch through some layers holds at most, weights and buffers not counted."""
    layers = chain.layers[start:stop]
    samples = [torch.rand(batch, *spec.shape) for spec in chain.boundaries[start]]
    begins = list(range(0, batch, micro_batch))
    if len(begins) > 1 and batch - begins[-1] < smallest:
        begins.pop()
    for layer in layers:
        layer.module.train()
        for parameter in layer.parameters().values():
            parameter.grad = None
    with StorageTracker() as tracker:
        for begin, end in zip(begins, [*begins[1:], batch], strict=True):
            tensors = tuple(sample[begin:end].clone() for sample in samples)
            for layer in layers:
                tensors = layer(*tensors)
            if stop == len(chain.layers):
                loss = F.cross_entropy(tensors[0], torch.zeros(end - begin, dtype=torch.int64))
            else:
                losses = [
                    F.mse_loss(tensor, torch.zeros_like(tensor), reduction="sum") for tensor in tensors if tensor.requires_grad
                ]
                loss = torch.stack(losses).sum()
                del losses
            del tensors
            loss.backward()
            del loss
    return tracker.peak


@pytest.mark.parametrize(
    ("build", "spec"),
    [
        (lambda: mlp(784, 80, 60, 60, 60, 47), flat(784)),
        (lambda: mlp(64, 1024, 512, 256, 10), flat(64)),
        (resnet, flat(3, 32, 32)),
        (Encoder, flat(3, 32, 32)),
        (Skip, flat(3, 8, 8)),
    ],
    ids=["mlp", "wide", "resnet", "transformer", "skip"],
)
@pytest.mark.usefixtures("tensors_only")
def test_predicted_peaks_bound_those_of_real_runs_closely(build, spec):
    chain = capture(build(), spec)
    costs = profile(chain, optimizers=[SGD], device=CPU)
    for micro_batch, batch in ((2, 2), (2, 7), (16, 16)):
        assert_bounds_closely(chain, costs, micro_batch, batch)


def assert_bounds_closely(chain, costs, micro_batch, batch):
    """What is predicted for spans of layers is at least what a real batch through them holds, and not much more."""
    end, smallest = len(chain.layers), costs.smallest_micro_batch
    assert end >= 4
    spans = {(0, end), (0, end // 2), (end // 2, end), (1, end - 1), (1, 2)}
    for start, stop in spans:
        layers = costs.layers[start:stop]
        resident = sum(layer.weight_bytes + 2 * layer.buffer_bytes for layer in layers)
        real = measured_peak(chain, start, stop, micro_batch, batch, smallest) + resident
        predicted = partition_peak(costs, start, stop, micro_batch, batch)
        # Scalars (the loss and its gradient) are not in the objective's bytes.
        assert real - 64 <= predicted
        # At the most: the gradient of a partition's inputs, which nobody asks for here, and gradients of one layer twice.
        largest = largest_micro_batch(batch, micro_batch, smallest)
        slack = max(layer.input_bytes.at(largest) + layer.output_bytes.at(largest) + layer.gradient_bytes for layer in layers)
        assert predicted <= real * 1.15 + slack
    whole = measured_peak(chain, 0, end, micro_batch, batch, smallest) + sum(
        layer.weight_bytes + 2 * layer.buffer_bytes for layer in costs.layers
    )
    # Gradients of two tensors at a cut are often one tensor, which cannot be seen from one layer.
    bound = 1.3 if any(len(specs) > 1 for specs in chain.boundaries) else 1.1
    assert partition_peak(costs, 0, end, micro_batch, batch) <= bound * whole


def test_a_layer_with_a_local_loss_keeps_nothing_but_its_outputs() -> None:
    chain = layers_with_heads(configure(max_gpu_mem="1GB", model="mlp:12-4", data="digits", method="neuroflux"))
    costs = profile(chain, optimizers=[OptimizerSpec("adam")], device=CPU, per_layer_loss=True)
    joined = profile(chain, optimizers=[OptimizerSpec("adam")], device=CPU)
    for own, layer in zip(costs.layers, joined.layers, strict=True):
        assert own.kept == Affine(0, 0)
        assert own.state_bytes == layer.state_bytes
    whole = peak_of(costs.layers, 64, 64, Affine(0, 0))
    assert whole < peak_of(joined.layers, 64, 64, Affine(0, 0))
    # State of all layers, and the activations of the largest.
    largest = max(peak_of((layer,), 64, 64, Affine(0, 0)) - layer.state_bytes for layer in costs.layers)
    states = sum(layer.state_bytes for layer in costs.layers)
    assert whole <= states + largest + max(layer.buffer_bytes for layer in costs.layers) * 8
    assert with_local_loss(joined.layers[0]).kept == Affine(0, 0)


def test_an_lstm_keeps_a_workspace_that_fake_tensors_do_not_show() -> None:
    class LastStep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(16, 128, batch_first=True)
            self.head = nn.Linear(128, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    (cost, *_) = profile_of(LastStep(), TensorSpec((12, 16), torch.float32)).layers
    # Of oneDNN's 1.57 MB for 16 samples: the gates, and five to six times the states.
    assert cost.kept.at(16) > 1_500_000
    assert cost.emit_peak.at(16) > 1_500_000
    assert cost.backward_peak.at(16) > 12 * 16 * 512 * 4 + 2 * 4 * 512 * (16 + 128)


def test_scores_of_attention_with_a_bias_that_learns_nothing_are_not_kept() -> None:
    costs = profile(capture(Attending(), (flat(128, 8), flat(1, 128, 128))), optimizers=[SGD], device=CPU).layers
    assert [cost.kept.per_sample < 128 * 128 * 4 for cost in costs] == [True] * 4
