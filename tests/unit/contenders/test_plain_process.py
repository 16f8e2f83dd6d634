"""The process of plain PyTorch: what of a run's settings it takes over."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.contenders import plain_process


@pytest.mark.parametrize(("tf32", "precision"), [(True, "high"), (False, "highest")])
def test_it_multiplies_in_tf32_where_runs_do(tf32: bool, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_gpu_mem": "1GB", "model": "mlp:20-3", "data": "digits", "device": "cuda", "tf32": tf32}
    settings = tmp_path / "plain.json"
    settings.write_text(json.dumps({"config": json.loads(FitConfig(**options).to_json()), "baseline": "plain"}))
    seen: list[str] = []

    def train(*_: object) -> dict[str, float]:
        seen.append(torch.get_float32_matmul_precision())
        return {}

    for name, double in {
        "is_gpu": lambda device: True, "named_inputs": lambda config: (), "make_workload": lambda *_: SimpleNamespace(),
        "warm_up": lambda device: None, "train": train,
    }.items():  # fmt: skip
        monkeypatch.setattr(plain_process, name, double)
    monkeypatch.setattr("sys.argv", ["plain_process", str(settings)])
    plain_process.main()
    assert seen == [precision]
    assert torch.get_float32_matmul_precision() == "highest"
