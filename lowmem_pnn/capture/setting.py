"""Settings: how a model is run on fake tensors, which have shapes and mostly no values."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem_pnn.capture.dispatch_modes import KnownValues, OperationLog
from lowmem_pnn.capture.equal_blocks import EqualBlocks
from lowmem_pnn.capture.unknown_values import UnknownValues
from lowmem_pnn.model.call_form import ONE_TENSOR, CallForm, TensorSpec
from lowmem_pnn.model.copies import copy_structure, set_mode
from lowmem_pnn.model.precision import Precision
from lowmem_pnn.model.python_state import Attribute
from lowmem_pnn.seeds import preserve_random_state

# Whoever does more than so many operations may do one for each call that it has counted, or as often as a value says.
_MOST_OPERATIONS = 2_000


@dataclass(frozen=True)
class Setting:
    """How a model is run on fake tensors.

    Args:
        specs: shape and type of each tensor of a sample.
        precision: compute precision and memory format.
        batch: number of samples.
        training: whether in train mode.
        form: how the tensors are handed to the model.
        learns_from: names of outputs, the first of which that there is training learns from; empty where it may learn from all.
        conditions: what conditions on values of the input are taken for.
        number: what numbers that are taken from these are taken for (`UnknownValues`).
        counts: attributes that hold whole numbers, and others that they are set to before.
        batches: other numbers of samples that will occur.
        values: whether what depends on sizes and constants alone has values, by which a forward may decide.
    """

    specs: tuple[TensorSpec, ...]
    precision: Precision
    batch: int
    training: bool
    form: CallForm = ONE_TENSOR
    learns_from: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    values: bool = True
    conditions: bool = False
    number: float = 1.0
    counts: tuple[tuple[Attribute, int], ...] = ()

    @property
    def mode_text(self) -> str:
        """The mode in words."""
        return "train" if self.training else "eval"

    @property
    def keeps_values(self) -> bool:
        """Whether tensors that depend on sizes and constants alone are no fake ones."""
        return self.values

    @property
    def fakes_are_elsewhere(self) -> bool:
        """Whether fake tensors are on another device than the CPU, where tensors with values are."""
        return self._device != "cpu"

    @property
    def _device(self) -> str:
        return "cpu" if self.precision.dtype == "fp32" else self.precision.device_type

    def error_prefix(self, model: nn.Module) -> str:
        """Return the beginning of the error of a model that does not run.

        Args:
            model: the user's model.
        """
        many = len(self.specs) > 1
        samples = ", ".join(
            f"{name!r} {spec}" if many else str(spec) for name, spec in zip(self.form.names, self.specs, strict=True)
        )
        maps = ", its maps channels last (--channels-last)" if self.precision.channels_last else ""
        return f"model {type(model).__name__} does not run on samples of {samples} in {self.mode_text} mode{maps}"

    def log(self, model: nn.Module, forward: Callable[["Fakes", OperationLog], Any]) -> list[tuple[Any, ...]]:
        """Run something on a copy of the model with fake tensors, and return the operations that depend on them.

        Args:
            model: module that stays as it is.
            forward: is given the copy, in its mode, with the samples, and the log.
        """
        fakes = self.fakes(model)
        may_loop = bool(self.counts) or self.number > 1
        log = OperationLog(
            [*fakes.samples, *fakes.root.parameters(), *fakes.root.buffers()], _MOST_OPERATIONS if may_loop else None
        )
        with fakes.context(), log:
            forward(fakes, log)
        return log.entries

    def fakes(self, model: nn.Module) -> "Fakes":
        """Return a copy of the model with fake tensors, in its mode, and fake samples.

        All fake tensors are on the CPU, wherever the model's are; under autocast, whose casts depend on the device, on the training device.

        Args:
            model: module that stays as it is.
        """
        device = self._device
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            samples = tuple(torch.empty((self.batch, *spec.shape), dtype=spec.dtype, device=device) for spec in self.specs)
            samples = self.precision.to_memory_format(samples)
            fakes: dict[int, Tensor] = {}
            for tensor in [*model.parameters(), *model.buffers()]:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        root = copy_structure(model, fakes)
        for (name, attribute), count in self.counts:
            vars(root.get_submodule(name))[attribute] = count
        set_mode(root, self.training)
        EqualBlocks(model, root)
        known = KnownValues(self.precision.device_type, device) if self.keeps_values else nullcontext()
        return Fakes(mode, root, samples, self.precision, known, UnknownValues(self.conditions, self.number))


@dataclass
class Fakes:
    """A copy of a model with fake tensors, and fake samples.

    Args:
        mode: the mode that they belong to.
        root: the copy.
        samples: tensors of a batch.
        precision: compute precision and memory format.
        known: mode that gives values to what does not depend on samples or weights.
        unknown: mode that answers what depends on them.
    """

    mode: FakeTensorMode
    root: nn.Module
    samples: tuple[Tensor, ...]
    precision: Precision
    known: AbstractContextManager[Any]
    unknown: UnknownValues

    @contextmanager
    def context(self) -> Iterator[None]:
        """Return the context in which the copy is run."""
        with (
            preserve_random_state(),
            _fake_tensor_log_disabled(),
            self.mode,
            self.unknown,
            self.known,
            torch.enable_grad(),
            self.precision.autocast(),
        ):
            yield


@contextmanager
def _fake_tensor_log_disabled() -> Iterator[None]:
    """Keep torch from logging the traceback of an operation that does not take its shapes: it is in the error that we raise."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def numbers_of_samples(batches: Sequence[int], splits: Sequence[int]) -> tuple[int, ...]:
    """Return numbers of samples that may go through a model at once: batches, what is left for the last ones, and powers of two below.

    Args:
        batches: samples of the optimizer's steps.
        splits: samples of the parts of the data.

    Example:
        >>> numbers_of_samples([10], [36])
        (1, 2, 4, 6, 8, 10)
    """
    found: set[int] = set()
    for batch in batches:
        found |= {batch, *(samples % batch for samples in splits), *(1 << power for power in range(batch.bit_length()))}
    return tuple(sorted(found - {0}))
