"""lowmem-pnn: train a network larger than the device's memory, one partition at a time, inside a byte budget."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem_pnn.api import evaluate, export, fit, load, load_weights, plan, predict
    from lowmem_pnn.config.fit_config import FitConfig
    from lowmem_pnn.contenders.bench import bench
    from lowmem_pnn.contenders.bench_report import BenchReport
    from lowmem_pnn.errors import BudgetError, ConfigError, LowMemError
    from lowmem_pnn.estimators import LowMemClassifier, LowMemRegressor
    from lowmem_pnn.inference.generate import generate
    from lowmem_pnn.reporting.plan_report import PlanReport
    from lowmem_pnn.reporting.progress import Display
    from lowmem_pnn.reporting.result import Result
    from lowmem_pnn.run.callbacks import Callback

__version__ = "0.1.0"
__all__ = [
    "BenchReport",
    "BudgetError",
    "Callback",
    "ConfigError",
    "Display",
    "FitConfig",
    "LowMemClassifier",
    "LowMemError",
    "LowMemRegressor",
    "PlanReport",
    "Result",
    "__version__",
    "bench",
    "evaluate",
    "export",
    "fit",
    "generate",
    "load",
    "load_weights",
    "plan",
    "predict",
]

_HOMES = {
    "BudgetError": "errors",
    "ConfigError": "errors",
    "Display": "reporting.progress",
    "FitConfig": "config.fit_config",
    "LowMemClassifier": "estimators.classifier",
    "LowMemError": "errors",
    "LowMemRegressor": "estimators.regressor",
    "BenchReport": "contenders.bench_report",
    "Callback": "run.callbacks",
    "PlanReport": "reporting.plan_report",
    "Result": "reporting.result",
    "bench": "contenders.bench",
    "evaluate": "api",
    "export": "api",
    "fit": "api",
    "generate": "inference.generate",
    "load": "api",
    "load_weights": "api",
    "plan": "api",
    "predict": "api",
}


def __getattr__(name: str) -> Any:
    # On first use: these import torch, which the command line's help does without.
    if name not in _HOMES:
        raise AttributeError(f"module 'lowmem_pnn' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"lowmem_pnn.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
