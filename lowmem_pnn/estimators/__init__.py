"""Estimators: training within a memory budget as scikit-learn's pipelines, searches and cross-validation call it."""

from lowmem_pnn.estimators.classifier import LowMemClassifier
from lowmem_pnn.estimators.regressor import LowMemRegressor

__all__ = ["LowMemClassifier", "LowMemRegressor"]
