"""The options' types for editors are those of the configuration."""

import importlib.util
from pathlib import Path

from lowmem_pnn.config.fit_config import field_names
from lowmem_pnn.settings.fit_options import FitOptions


def test_the_types_are_up_to_date() -> None:
    file = Path(__file__).parents[3] / "docs" / "fit_options.py"
    spec = importlib.util.spec_from_file_location("fit_options_script", file)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.TARGET.read_text() == script.module_text(), "run python docs/fit_options.py"


def test_every_option_has_a_type() -> None:
    assert set(field_names()) - set(FitOptions.__annotations__) == {"max_gpu_mem", "model", "data", "loss", "weights"}
