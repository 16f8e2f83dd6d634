"""Mixing of samples: modules whose output for a sample depends on the others of its batch, found by running each layer before training.

    whole       a  b --[ layer ]--> A  B        the same samples, seed, buffers and shapes each time, so that a row that stays what it is
    a's twin    a  a --[ layer ]--> A' .        must be the same: A' = A, B' = B, unless the layer mixes rows
    b's twin    b  b --[ layer ]--> .  B'
    b alone     b    --[ layer ]--> B"          B" = B, but for rounding, unless the layer asks how many there are, or which one this is

PyTorch's own modules mix nothing but in BatchNorm, which is known without looking (`Workload.batch_norms`): they are in eval mode, where
they draw nothing at random. But they are run: many take the first axis for time unless they are told that it is the batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lowmem_pnn.capture.dispatch_modes import tensors_in
from lowmem_pnn.device import is_out_of_memory
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.seeds import preserve_random_state, seed_generators, seed_of
from lowmem_pnn.training.observed import difference
from lowmem_pnn.training.parity import layers_of
from lowmem_pnn.workload import Workload

Outputs = tuple[Tensor, ...]
Call = tuple[str, list[Tensor], list[Tensor]]
"""Name of a module, and copies of what went in and what came out."""

# Samples that are looked through for one unlike the first.
_SAMPLES = 16
# Relative difference of a row up to which it is the same, where it was run at the same shapes, and at others in the shortest precision.
_SAME, _ROUNDING = 1e-6, 0.1
# Seeds for layers that draw at random: a random permutation of two samples leaves them in their places every second time.
_SEEDS = 6


def find_mixing(workload: Workload, model: nn.Module, say: Callable[[str], None]) -> dict[str, int]:
    """Find modules that mix the samples of a batch, beside BatchNorm; under micro-batches they train otherwise than in plain PyTorch.

    Args:
        workload: model in layers, and data.
        model: the model as its constructor gives it, with the values that training begins with; it stays as it is.
        say: is told where nothing could be found out.

    Returns:
        The first such module of each layer that has one, in words, or the layer where none of its modules does it alone; with the
        layer's number.
    """
    samples = _two_samples(workload)
    if samples is None:
        return {}
    known, found = {f"module {name!r}" for name in workload.batch_norms()}, dict[str, int]()
    layer = workload.bare.layers[0]
    try:
        with preserve_random_state(), layers_of(workload, model), torch.no_grad():
            inputs = samples
            for number, layer in enumerate(workload.bare.layers):
                trial = _Trial(layer, inputs, workload.config.seed)
                name = next((name for mode in trial.modes() if (name := trial.mixes(mode)) is not None), None)
                if name is not None and name not in known:
                    found[name] = number
                inputs = trial.run(None, training=False)
    except Exception as error:
        reason = "it does not fit" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        say(
            f"whether model {workload.source.spec} mixes samples was not found out from layer {layer.name!r} on, of two samples: "
            f"{' '.join(reason.split())[:200]}"
        )
    return found


def _two_samples(workload: Workload) -> Outputs | None:
    """Return two training samples that are not the same; None where there are none among the first ones."""
    split = workload.splits["train"]
    for number in range(1, min(len(split), _SAMPLES)):
        samples, _ = split.batch([0, number])
        tensors = (samples,) if isinstance(samples, Tensor) else samples
        if not all(torch.equal(tensor[0], tensor[1]) for tensor in tensors):
            return tensors
    return None


class _Trial:
    """A layer with two rows of inputs, run on them and on what they are compared with, always from the same state."""

    def __init__(self, layer: Layer, inputs: Outputs, seed: int) -> None:
        self._layer, self._inputs, self._seed = layer, inputs, seed
        self._python_state = layer.python_state
        self._buffers = {name: buffer.clone() for name, buffer in layer.buffers().items()}
        self._draws = False

    @property
    def _title(self) -> str:
        return f"layer {self._layer.name!r}"

    def modes(self) -> Sequence[bool]:
        """Return the modes to look at: training or not; only modules of the user's own may differ between them."""
        return (False, True) if any(map(_is_own, self._layer.module.modules())) else (False,)

    def run(self, rows: list[int] | None, *, training: bool, draw: int = 0) -> Outputs:
        """Run the layer on rows of the inputs; None for all of them as they are."""
        layer = self._layer
        layer.train(training)
        for module in layer.module.modules():
            if not _is_own(module):
                module.training = False
        layer.set_python_state(self._python_state)
        for name, buffer in layer.buffers().items():
            buffer.copy_(self._buffers[name])
        seed_generators(seed_of(self._seed, "mixing", draw))
        before = torch.get_rng_state()
        outputs = layer(*(tensor.clone() if rows is None else tensor[rows] for tensor in self._inputs))
        self._draws = self._draws or not torch.equal(before, torch.get_rng_state())
        return outputs

    def mixes(self, training: bool) -> str | None:
        """Return the first module that mixes rows, or the layer, in words; None where nothing does."""
        self._draws = False
        whole = self.run([0, 1], training=training)
        for draw in range(_SEEDS if self._draws else 1):
            if draw:
                whole = self.run([0, 1], training=training, draw=draw)
            for row in (0, 1):
                try:
                    twin = self.run([row, row], training=training, draw=draw)
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    return self._title  # two of the same are no batch for it
                if self._differs(whole, twin, row):
                    if self._differs(whole, self.run([0, 1], training=training, draw=draw), row):
                        return None  # something else each time: nothing can be said
                    return self._first_module(training, draw, row)
        if not self._draws and self._differs_alone(whole, training):
            return self._title
        return None

    def _differs_alone(self, whole: Outputs, training: bool) -> bool:
        try:
            alone = self.run([1], training=training)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return False  # what takes no single sample is given none
        pairs = list(zip(whole, alone, strict=True))
        return all(one.shape[:1] == (1,) and one.shape[1:] == two.shape[1:] for two, one in pairs) and any(
            difference(two[1], one[0]) > _ROUNDING for two, one in pairs
        )

    @staticmethod
    def _differs(whole: Outputs, other: Outputs, row: int) -> bool:
        return any(difference(one[row], two[row]) > _SAME for one, two in zip(whole, other, strict=True))

    def _first_module(self, training: bool, draw: int, row: int) -> str:
        """Return the module, ended first, that is given the same row and gives another one; the layer where there is none."""
        whole, twin = ([*self._calls(rows, training, draw)] for rows in ([0, 1], [row, row]))
        for (name, given, made), (_, given_twin, made_twin) in zip(whole, twin, strict=False):
            if _same_row(given, given_twin, row) and not _same_row(made, made_twin, row):
                return f"module {name!r}"
        return self._title

    def _calls(self, rows: list[int], training: bool, draw: int) -> list[Call]:
        """Run the layer, and return the calls of its modules in the order in which they end."""
        calls: list[Call] = []
        open_calls: list[list[Tensor]] = []
        handles = []
        for name, module in self._layer.module.named_modules():
            if not name or type(module) is nn.Module:
                continue

            def enter(_: nn.Module, args: object, kwargs: object) -> None:
                open_calls.append([tensor.clone() for tensor in tensors_in((args, kwargs))])

            def leave(_: nn.Module, args: object, output: object, name: str = name) -> None:
                calls.append((name, open_calls.pop(), [tensor.clone() for tensor in tensors_in(output)[:1]]))

            handles += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
        try:
            self.run(rows, training=training, draw=draw)
        finally:
            for handle in handles:
                handle.remove()
        return calls


def _is_own(module: nn.Module) -> bool:
    """Decide whether a module is of a class of the user's own: none of PyTorch's, and no BatchNorm, which is known."""
    return not type(module).__module__.startswith("torch.") and not isinstance(module, nn.modules.batchnorm._BatchNorm)


def _same_row(ones: list[Tensor], others: list[Tensor], row: int) -> bool:
    """Decide whether tensors have the same row, or are the same where they have no row for each sample."""
    for one, other in zip(ones, others, strict=True):
        own = (one[row], other[row]) if one.dim() and len(one) == 2 else (one, other)
        if difference(*own) > _SAME:
            return False
    return True
