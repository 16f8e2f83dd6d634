"""The result of a run: the content of `result.json`, the page that people read, and what leads on from it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lowmem_pnn.errors import LowMemError
from lowmem_pnn.pretrained.model_file import load_into
from lowmem_pnn.reporting.page_process import PAGE, write_page_apart
from lowmem_pnn.reporting.result_fields import ResultFields
from lowmem_pnn.reporting.result_text import describe_result


@dataclass(frozen=True, kw_only=True)
class Result(ResultFields):
    """Result of a run: the content of `result.json`, whose keys `ResultFields` describes."""

    def to_json(self) -> str:
        """Return the text of `result.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """Read a result that `to_json` wrote, in this version or another; keys that are not known are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})

    def load(self, model: nn.Module) -> nn.Module:
        """Load the trained weights into a model of the class that was trained.

        Args:
            model: the model, which is changed.

        Returns:
            The same model.

        Raises:
            CheckpointError: the weights are gone, or not of such a model: all that differs is named.
        """
        load_into(model, self.weights_file)
        return model

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

    def __str__(self) -> str:
        """Return the result for people; the last six lines are a summary."""
        return self.describe()
