"""What both estimators share: parameters, one run for each fit, and prediction by it within the same budget."""

import copy
import inspect
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from lowmem_pnn.api import fit, predict
from lowmem_pnn.config.code import names_code
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.inference.load import remember
from lowmem_pnn.memory.available import is_share

_HIDDEN = 128
# Parameters that are options of `fit` under the same names; None leaves them to its defaults.
_OPTIONS = (
    "max_gpu_mem", "method", "epochs", "batch_size", "optimizer", "lr", "weight_decay", "device", "val_fraction", "verbose",
)  # fmt: skip

# What scikit-learn's check of samples keeps of them.
_COLUMNS = ("n_features_in_", "feature_names_in_")


class LowMemEstimator(BaseEstimator):  # type: ignore[misc]
    """Base class of the estimators.

    Args:
        model: a model's name as `fit` takes it, a model, which is copied for each fit, or a function that builds one; as far as it has
            parameters `num_features` and `num_outputs`, it is given them: the columns of X, and the classes or values that are predicted.
            None is a perceptron with a hidden layer of 128.
        max_gpu_mem: the budget of training and of prediction, as `fit` takes it: "2GB", bytes, "75%" or "auto".
        method: training method, as `fit` takes it; so are the parameters up to `val_fraction`, None being its default.
        epochs: epochs of training.
        batch_size: samples of an optimizer step.
        optimizer: `sgd`, `adam` or `adamw`.
        lr: learning rate.
        weight_decay: weight decay.
        device: `auto`, `cpu` or `cuda`.
        val_fraction: part of the samples that is measured after each epoch, and not learnt.
        random_state: seed of initial weights and of the order of samples, as in scikit-learn.
        options: other options of `fit` by name, which count before the parameters; with a loss of your own, it says what is learnt of y.
        workdir: folder in which each fit leaves its run; None has a temporary folder, which goes with the estimator, and is pickled with it.
        verbose: whether progress is shown.

    Attributes:
        result_: the run's `Result`.
        n_features_in_: columns of X.
        feature_names_in_: names of the columns, where X has such.
    """

    def __init__(
        self,
        model: str | nn.Module | Callable[..., nn.Module] | None = None,
        *,
        max_gpu_mem: str | int = "auto",
        method: str = "exact",
        epochs: int = 10,
        batch_size: int | None = None,
        optimizer: str | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        device: str | None = None,
        val_fraction: float = 0.0,
        random_state: Any = None,
        options: Mapping[str, Any] | None = None,
        workdir: str | Path | None = None,
        verbose: bool = False,
    ) -> None:
        self.model = model
        self.max_gpu_mem = max_gpu_mem
        self.method = method
        self.epochs = epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.lr = lr
        self.weight_decay = weight_decay
        self.device = device
        self.val_fraction = val_fraction
        self.random_state = random_state
        self.options = options
        self.workdir = workdir
        self.verbose = verbose

    @contextmanager
    def _fitted_unless_it_fails(self) -> Iterator[None]:
        """Return a context of a fit: where it fails, columns and their names stay those of the fit before."""
        before = {name: value for name, value in self.__dict__.items() if name in _COLUMNS}
        try:
            yield
        except BaseException:
            for name in _COLUMNS:
                self.__dict__.pop(name, None)
            self.__dict__.update(before)
            raise

    def _train(self, x: npt.NDArray[Any], y: npt.NDArray[Any], num_outputs: int, task: str) -> None:
        """Train a run of its own on checked samples x (N, ...) and targets y (N,) or (N, values)."""
        builder = self._named_or_built(x, num_outputs)
        if taken := [name for name in ("model", "train") if name in (self.options or {})]:
            raise ConfigError(f"options has {taken[0]!r}, which is given to the estimator itself; leave it out of options")
        given = {name: value for name in _OPTIONS if (value := self._asked(name)) is not None}
        if not _is_own_loss(self._asked("loss")):
            given["task"] = task  # values that are whole numbers look like classes
        given["seed"] = int(check_random_state(self.random_state).randint(2**31 - 1))
        temporary, kept_in = None, self._asked("workdir")
        if kept_in is None:
            temporary = _TemporaryFolder()
            folder = temporary.path
        else:
            Path(kept_in).mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="fit-", dir=kept_in)).absolute()
        try:
            result = fit(builder, (x, y), **{**given, **(self.options or {}), "workdir": folder})
        except BaseException:
            with suppress(OSError):
                folder.rmdir()  # where nothing was begun
            raise
        # A model is remembered as long as this estimator is there: a search makes a copy of it for each of its fits.
        remember(folder, builder, weakly=True)
        # Only now: where a fit fails, what was fitted before stays.
        self._builder = builder
        self._temporary = temporary
        self._folder = folder
        self.result_ = result

    def _asked(self, name: str) -> Any:
        """Return the value of an option of `fit`; None where it was left out."""
        return (self.options or {}).get(name, getattr(self, name, None))

    def _named_or_built(self, x: npt.NDArray[Any], num_outputs: int) -> Any:
        model = self.model
        if isinstance(model, str):
            return model
        if isinstance(model, nn.Module):
            return _Copies(model)
        if model is None:
            return f"mlp:{int(np.prod(x.shape[1:]))}-{_HIDDEN}-{num_outputs}"
        if not callable(model):
            raise ConfigError(f"model is {model!r}; give a model's name, a model, or a function that builds one")
        return _Call(model, {"num_features": x.shape[1], "num_outputs": num_outputs})

    def _outputs(self, x: Any) -> npt.NDArray[Any]:
        """Return the model's outputs (N, ...) for samples, in their order."""
        check_is_fitted(self, "result_")
        x = self._checked(x, reset=False)
        model = None if isinstance(self._builder, str) else self._builder
        # The machine may be another by now: what was set since counts. A share is of what was free when it was fitted.
        asked = self._asked("max_gpu_mem")
        budget = None if is_share(asked) else asked
        device = self._asked("device")
        # Code that the run names is what the parameters of this estimator name.
        found = predict(self._folder, x, model=model, max_gpu_mem=budget, device=device, trust=True)
        outputs: npt.NDArray[Any] | None = found.get("scores", found.get("outputs"))
        if outputs is None:
            names = " and ".join(name for name in found if name != "targets")
            raise ConfigError(f"the model gives {names}, and an estimator predicts by one tensor; give a model that gives one")
        return outputs

    def _checked(self, x: Any, y: Any = "no_validation", **how: Any) -> Any:
        """Return samples, and targets where they are given, as arrays: float32, finite, of the columns that were fitted."""
        checked = validate_data(self, x, y, dtype=np.float32, order="C", allow_nd=True, **how)
        if y is not None and isinstance(y, str) and y == "no_validation":
            return _writable(checked)
        return _writable(checked[0]), checked[1]

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "result_")

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())  # which may be the object's own dictionary
        if state.get("_temporary") is not None:
            files = [path for path in self._folder.rglob("*") if path.is_file() and path.name != "lock"]
            state["_temporary"] = {str(path.relative_to(self._folder)): path.read_bytes() for path in files}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if isinstance(kept := state.get("_temporary"), dict):
            self._temporary = _TemporaryFolder()
            self._folder = self._temporary.path
            for name, content in kept.items():
                (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self._folder / name).write_bytes(content)
            self.result_ = self.result_.moved_to(self._folder)


class _TemporaryFolder:
    """A folder that is deleted with this object, or at the end of the process."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="lowmem-pnn-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class _Copies:
    """Builds copies of a model, so that the parameter stays as it was given."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.__name__ = type(model).__name__

    def __call__(self) -> nn.Module:
        return copy.deepcopy(self._model)


class _Call:
    """Builds a model by a function that is told the sizes that it asks for."""

    def __init__(self, build: Callable[..., nn.Module], sizes: Mapping[str, int]) -> None:
        asked = inspect.signature(build).parameters
        self._build = build
        self._sizes = {name: size for name, size in sizes.items() if name in asked}
        self.__name__ = getattr(build, "__name__", "factory")

    def __call__(self) -> nn.Module:
        return self._build(**self._sizes)


def _is_own_loss(loss: Any) -> bool:
    """Whether a loss is the user's own: a function, or the name of one."""
    return callable(loss) or (isinstance(loss, str) and names_code("loss", loss))


def _writable(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array that torch can take without a warning: mapped ones of joblib are not writable."""
    return x if x.flags.writeable else x.copy()
