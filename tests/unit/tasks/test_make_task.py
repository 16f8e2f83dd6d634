"""The task of a run: options about targets that the source of the data does not go by are refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.tasks.make_task import Own, make_task
from lowmem_pnn.tasks.task import Task
from lowmem_pnn.workload.inputs import open_data


def task(model: str, data: str, **options: Any) -> Task:
    config = configure(max_gpu_mem="100MB", model=model, data=data, device="cpu", method="exact", **options)
    return make_task(config, open_data(config).dataset.targets, Own(), SimpleNamespace(output_form=None))  # type: ignore[arg-type]


def written(folder: Path, data: str) -> str:
    """The name of a small source of a kind."""
    match data:
        case "imagefolder":
            for name in "ab":
                (folder / name).mkdir()
                Image.new("RGB", (8, 8)).save(folder / name / "a.png")
            return f"imagefolder:{folder}"
        case "text":
            (folder / "a").write_text("some words " * 20)
        case "tokens":
            np.arange(90, dtype=np.uint16).tofile(folder / "a")
        case "jsonl":
            (folder / "a").write_text("\n".join(json.dumps({"text": f"word {n}", "stars": n % 3}) for n in range(9)))
        case "csv":
            (folder / "a").write_text("a,y\n" + "\n".join(f"{n},{n / 2}" for n in range(20)))
        case "factory":
            (folder / "own.py").write_text(
                "import torch\nfrom lowmem_pnn.sources.datasets import make_dataset\n"
                "def load():\n    return make_dataset((torch.zeros(9, 64), torch.arange(9) % 3), name='x')\n"
            )
            return f"{folder}/own.py:load"
    return data if data == "digits" else f"{data}:{folder / 'a'}"


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("digits", {"task": "regression"}, "--task regression: the targets of data digits are for classification, whatever is asked for; leave"),
        ("digits", {"ignore_index": 3}, "--ignore-index 3 has no effect here: data digits leaves out -100; leave the option out"),
        ("imagefolder", {"ignore_index": 0}, "--ignore-index 0 has no effect here: data imagefolder:.* leaves out -100"),
        ("text", {"ignore_index": 32}, "--ignore-index 32 has no effect here: data text:.* leaves out -100"),
        ("tokens", {"ignore_index": 0}, "--ignore-index 0 has no effect here: data tokens:.* leaves out -100"),
        ("jsonl", {"task": "regression", "target": "stars"}, "--task regression: the targets of data jsonl:.* are for classification"),
        ("factory", {"task": "multilabel"}, "--task multilabel: the targets of data .*own.py:load are for classification, whatever"),
        ("csv", {"ignore_index": 0, "target": "y", "task": "regression"}, "--ignore-index has no meaning for regression; leave it out"),
    ],
)  # fmt: skip
def test_what_a_source_does_not_go_by_is_refused(data: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    models = {"imagefolder": "mlp:192-2", "digits": "mlp:64-10", "factory": "mlp:64-3", "csv": "mlp:1-1"}
    if data not in models:
        options = {**options, "data_root": tmp_path / "root"} if data == "jsonl" else options
        options |= {"context": 8} if data != "text" else {}
    model = models.get(data, "gpt:layers=1,width=8,heads=1,context=8")
    with pytest.raises(ConfigError, match=message):
        task(model, written(tmp_path, data), **options)


def test_what_a_source_goes_by_is_taken() -> None:
    assert task("mlp:64-10", "digits", task="classification", ignore_index=-100).name == "classification"
