"""Loggers: what a run logs, told to TensorBoard, Weights & Biases or MLflow. Their packages are imported where one is asked for."""

import importlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import ConfigError, Stopped
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.run.callbacks import Callback
from lowmem_pnn.stores.disk import write_durably
from lowmem_pnn.stores.run_creation import LOGGER_FILE, TENSORBOARD_FOLDER

_PROJECT = "lowmem-pnn"
_OF_EPOCHS = ("samples_per_second", "peak_bytes", "micro_batch", "epoch")
# What the file of the services has steps under.
_STEPS = "steps"

Ending = Literal["done", "stopped", "failed"]


class Service(ABC):
    """What a logger writes to. Made before the memory floor is taken: what it imports is in the floor.

    Raises:
        ConfigError: its package cannot be imported.
    """

    @abstractmethod
    def open(self, folder: Path, options: Mapping[str, Any], earlier: str | None) -> tuple[str | None, str]:
        """Begin to log a run, or go on with one.

        Args:
            folder: the run's folder, whose name the run gets.
            options: the run's options.
            earlier: what an earlier process of the run got as the first value; None for a run that begins.

        Returns:
            What another process has to know to go on with the same run, and where to look, in words.
        """

    @abstractmethod
    def write(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write some values.

        Args:
            group: what they are of, before a slash in their names.
            values: numbers by name.
            step: optimizer steps of the group by then.
        """

    @abstractmethod
    def close(self, ending: Ending) -> None:
        """Bring all that was written to its place; nothing may have been opened."""


class TensorBoard(Service):
    """TensorBoard's event files in the run's folder, in `tensorboard/`."""

    def __init__(self) -> None:
        _package("tensorboard")
        self._module = _package("torch.utils.tensorboard", "tensorboard")
        self._writer: Any = None

    def open(self, folder: Path, options: Mapping[str, Any], earlier: str | None) -> tuple[str | None, str]:
        """Begin another file beside those of earlier processes; steps that are done again lie on the same curve."""
        self._writer = self._module.SummaryWriter(str(folder / TENSORBOARD_FOLDER))
        if earlier is None:
            self._writer.add_text("options", "\n".join(f"    {name} = {value!r}" for name, value in options.items()))
        return "tensorboard", f"tensorboard --logdir {folder / TENSORBOARD_FOLDER}"

    def write(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write a scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)
        if "epoch" in values:
            self._writer.flush()

    def close(self, ending: Ending) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Service):
    """Weights & Biases, as its own variables say (`WANDB_MODE=offline`, `WANDB_PROJECT`); its files lie in the run's folder, in `wandb/`."""

    def __init__(self) -> None:
        self._module = _package("wandb")
        self._run: Any = None
        self._groups: set[str] = set()

    def open(self, folder: Path, options: Mapping[str, Any], earlier: str | None) -> tuple[str | None, str]:
        """Begin a run, or go on with the one of the same id."""
        self._run = self._module.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            dir=str(folder),
            name=folder.name,
            id=earlier,
            resume=None if earlier is None else "allow",
            settings=self._module.Settings(console="off", silent=True),
        )
        self._run.config.update(dict(options), allow_val_change=True)
        is_offline = getattr(self._run, "offline", False)
        return self._run.id, f"wandb: {f'wandb sync {Path(self._run.dir).parent}' if is_offline else self._run.url}"

    def write(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Log the values, whose axis is the group's own steps."""
        if group not in self._groups:
            self._groups.add(group)
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self._run.log({**{f"{group}/{name}": value for name, value in values.items()}, f"{group}/step": step})

    def close(self, ending: Ending) -> None:
        """Finish the run; one that was stopped, or failed, is marked as failed until it goes on."""
        if self._run is not None:
            self._run.finish(exit_code=0 if ending == "done" else 1)


class MLflow(Service):
    """MLflow, as its own variables and calls say (`MLFLOW_TRACKING_URI`, `mlflow.set_experiment`); inside an open run as its child."""

    def __init__(self) -> None:
        self._module = _package("mlflow")
        self._run: Any = None

    def open(self, folder: Path, options: Mapping[str, Any], earlier: str | None) -> tuple[str | None, str]:
        """Start a run with the options as its parameters, or go on with one."""
        is_inside = self._module.active_run() is not None
        self._run = self._module.start_run(run_id=earlier, run_name=None if earlier else folder.name, nested=is_inside)
        if earlier is None:
            self._module.log_params({name: str(value)[:500] for name, value in options.items()})
        return self._run.info.run_id, f"mlflow: run {self._run.info.run_id} at {self._module.get_tracking_uri()}"

    def write(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Log a metric for each value."""
        self._module.log_metrics({f"{group}/{name}": value for name, value in values.items()}, step=step)

    def close(self, ending: Ending) -> None:
        """End the run."""
        if self._run is not None:
            self._module.end_run({"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[ending])


SERVICES: Mapping[str, type[Service]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
"""What `--logger` names."""


class Logger(Callback):
    """Tells a service what a run logs: steps, epochs, and the scores at its end.

    Values are of `model`, or, where partitions learn one after the other, of `partition 1` and so on; their axis is its optimizer steps. A
    service that cannot be reached when the run begins ends it; one that fails later is told of, and not told anything more.

    Args:
        config: options of the run.
        display: is told where to look, and of a failure.

    Raises:
        ConfigError: the service's package cannot be imported.
    """

    def __init__(self, config: FitConfig, display: Display) -> None:
        self._service: Service | None = SERVICES[config.logger]()
        self._config, self._display = config, display
        self._num_partitions = 1
        self._folder, self._ids = Path(), dict[str, str | None]()
        # Optimizer steps by group; those of earlier processes too.
        self._steps: dict[str, int] = {}
        self._ending: Ending = "failed"

    def on_fit_start(self, info: Mapping[str, Any]) -> None:
        """Open the run at the service."""
        self._num_partitions = info["partitions"]
        self._folder, name = Path(info["workdir"]), self._config.logger
        options = {key: value for key, value in json.loads(self._config.to_json()).items() if value is not None}
        if info["resumed"]:
            self._ids, self._steps = _read_notes(self._folder)
        assert self._service is not None
        try:
            self._ids[name], where = self._service.open(self._folder, options, self._ids.get(name))
        except Exception as error:
            self._service = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ConfigError(
                f"--logger {name} cannot begin to log: {reason}; or give --logger none, with --resume too"
            ) from error
        self._note()
        self._display.message(where)

    def on_step_end(self, info: Mapping[str, Any]) -> None:
        """Log a step of every `--log-every`."""
        group = self._group(info)
        self._steps[group] = info["step"]
        if info["step"] % self._config.log_every == 0:
            self._write(group, {name: info[name] for name in ("loss", "lr", "used_bytes")})

    def on_epoch_end(self, info: Mapping[str, Any]) -> None:
        """Log an epoch, after the steps that it took."""
        told = {name: value for name, value in info.items() if name in _OF_EPOCHS or name.startswith(("train_", "val_"))}
        self._write(self._group(info), told)
        self._note()

    def on_fit_end(self, info: Mapping[str, Any]) -> None:
        """Log the scores of the trained model, and what the run took."""
        self._steps.update({group: max(self._steps.values(), default=0) for group in ("val", "test", "run")})
        for part, scores in info["scores"].items():
            self._write(part, scores)
        self._write(
            "run", {name: info[name] for name in ("seconds", "peak_bytes", "budget_bytes", "bytes_read", "bytes_written")}
        )
        self._ending = "done"

    def close(self, error: BaseException | None) -> None:
        """End the run at the service.

        Args:
            error: what ended the run before its end.
        """
        if self._service is not None:
            ending: Ending = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else self._ending
            service, self._service = self._service, None
            with self._losing_the_log_alone():
                service.close(ending)

    def _note(self) -> None:
        """Note what another process needs to go on: a run that is killed while it is tested has no step left to do."""
        write_durably(self._folder / LOGGER_FILE, json.dumps({**self._ids, _STEPS: self._steps}))

    def _group(self, info: Mapping[str, Any]) -> str:
        is_own = info["action"] == "learn" and self._num_partitions > 1
        return f"partition {info['partition'] + 1}" if is_own else "model"

    def _write(self, group: str, told: Mapping[str, Any]) -> None:
        values = {name: float(value) for name, value in told.items() if isinstance(value, int | float) and math.isfinite(value)}
        if self._service is not None and values:
            with self._losing_the_log_alone():
                self._service.write(group, values, self._steps.get(group, 0))

    @contextmanager
    def _losing_the_log_alone(self) -> Iterator[None]:
        """Go on without the service where it fails: a server that is away is no reason to lose a training."""
        try:
            yield
        except Exception as error:
            self._service = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._display.message(
                f"--logger {self._config.logger} failed, and logs no more: {reason}; metrics.jsonl has all of it"
            )


@contextmanager
def open_logger(config: FitConfig, display: Display) -> Iterator[tuple[Callback, ...]]:
    """Make the logger that the options ask for, and close it however the run ends.

    Args:
        config: options of the run.
        display: is told where to look.

    Raises:
        ConfigError: its package cannot be imported.
    """
    if config.logger == "none":
        yield ()
        return
    logger = Logger(config, display)
    try:
        yield (logger,)
    except BaseException as error:
        logger.close(error)
        raise
    logger.close(None)


def _package(module: str, package: str | None = None) -> Any:
    """Import what a service needs."""
    package = package or module
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"--logger {package} needs {package}, which cannot be imported ({error}); run: pip install 'lowmem-pnn[{package}]'"
        ) from error


def _read_notes(folder: Path) -> tuple[dict[str, str | None], dict[str, int]]:
    """Return what earlier processes of a run have noted for each service, and their steps by group; nothing where that is lost."""
    with suppress(OSError, ValueError):
        known = json.loads((folder / LOGGER_FILE).read_text())
        if isinstance(known, dict):
            steps = known.get(_STEPS, {})
            ids: dict[str, str | None] = {name: value for name, value in known.items() if isinstance(value, str)}
            return ids, {group: step for group, step in steps.items() if isinstance(step, int)} if isinstance(steps, dict) else {}
    return {}, {}
