"""The result of a run: the content of `result.json`, the page that people read, and what leads on from it."""

import dataclasses
import importlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lowmem_pnn.errors import LowMemError
from lowmem_pnn.model.python_state import write_by_name
from lowmem_pnn.pretrained.model_file import load_into
from lowmem_pnn.reporting.page_process import PAGE, write_page_apart
from lowmem_pnn.reporting.result_fields import ResultFields
from lowmem_pnn.reporting.result_html import result_html
from lowmem_pnn.reporting.result_text import describe_result, score_text
from lowmem_pnn.units import format_bytes

# Keys of a partition that are of its plan; the others were measured.
_PLANNED = (
    "start", "stop", "layers", "params", "micro_batch", "batch", "state_bytes", "predicted_peak_bytes", "ahead_bytes", "activation_bytes",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class Result(ResultFields):
    """Result of a run: the content of `result.json`, whose keys `ResultFields` describes."""

    @property
    def history(self) -> dict[str, list[Any]]:
        """What `metrics.jsonl` says of each epoch, as lists of the same length: `epoch`, `partition` (from 0), `train_loss`, `val_loss`,
        `val_accuracy`, `seconds` and others; None where something was not measured. Empty where the file is gone.
        """
        lines: list[dict[str, Any]] = []
        with suppress(OSError):
            for text in (Path(self.workdir) / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):  # a line that a kill has cut off
                    lines.append(json.loads(text))
        epochs = [line for line in lines if isinstance(line, dict) and "train_loss" in line]
        names = dict.fromkeys(name for line in epochs for name in line if name not in ("memory", "waiting", "visit", "action"))
        return {name: [line.get(name) for line in epochs] for name in names}

    @property
    def plan(self) -> dict[str, Any]:
        """What was planned: `budget_bytes`, `reserve_bytes`, `predicted_peak_bytes`, `plain_bytes`, and `partitions` with their layers,
        micro-batches and predicted peaks.
        """
        parts = [{name: part[name] for name in _PLANNED if name in part} for part in self.partitions]
        return {
            "method": self.method,
            "budget_bytes": self.budget_bytes,
            "reserve_bytes": self.reserve_bytes,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "plain_bytes": self.plain_bytes,
            "partitions": parts,
        }

    def to_json(self) -> str:
        """Return the text of `result.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """Read a result that `to_json` wrote, in this version or another; keys that are not known are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})

    def moved_to(self, folder: Path) -> "Result":
        """Return the result of the same run in the folder that it lies in now: copied, renamed, or given in another way.

        Args:
            folder: folder of the run.
        """
        places = {name: getattr(self, name) for name in ("weights_file", "transformers_folder", "adapter")}
        here: dict[str, Any] = {name: str(folder / Path(place).name) for name, place in places.items() if place is not None}
        return dataclasses.replace(self, workdir=str(folder), **here)

    def load(self, model: nn.Module) -> nn.Module:
        """Load the trained weights, and `module_state`, into a model of the class that was trained.

        Args:
            model: the model, which is changed.

        Returns:
            The same model.

        Raises:
            CheckpointError: the weights are gone, or not of such a model: all that differs is named, and the model stays as it is.
        """
        load_into(model, self.weights_file)
        write_by_name(model, self.module_state)
        return model

    def generate(self, prompts: Any, **options: Any) -> Any:
        """Have the language model that was trained go on with texts: `lowmem_pnn.generate(result, prompts, ...)`.

        Args:
            prompts: a text, or several.
            **options: as `lowmem_pnn.generate` takes them.

        Returns:
            What the model said: a text, or a list of texts.
        """
        # By its public name: what comes after training is above results.
        return importlib.import_module("lowmem_pnn").generate(self, prompts, **options)

    def report(self, out: str | Path | None = None) -> Path:
        """Write the page of the run: memory over time, plan, learning, and where the seconds went.

        Args:
            out: the HTML file; None takes `report.html` in the run's folder.

        Returns:
            The file.

        Raises:
            LowMemError: there is no page, and why.
        """
        file = Path(self.workdir) / PAGE if out is None else Path(out)
        if fault := write_page_apart([Path(self.workdir)], file):
            raise LowMemError(f"no page of {self.workdir}: {fault}")
        return file

    def describe(self, width: int | None = None) -> str:
        """Return the result for people.

        Args:
            width: columns that tables are to fit, if they can; None for as many as they take.
        """
        return describe_result(self, width)

    def __repr__(self) -> str:
        """Return the result in a line."""
        return (
            f"<Result of {self.model} on {self.data} by {self.method}: peak {format_bytes(self.peak_bytes)} of "
            f"{format_bytes(self.budget_bytes)}, {score_text(self)}; {self.workdir}>"
        )

    def _repr_html_(self) -> str:
        """Return the result for notebooks."""
        return result_html(self)

    def __str__(self) -> str:
        """Return the result for people; the last six lines are a summary."""
        return self.describe()
