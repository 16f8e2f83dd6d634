"""The regressor: values by scikit-learn's interface, learnt within a memory budget."""

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import RegressorMixin

from lowmem_pnn.estimators.estimator import LowMemEstimator


class LowMemRegressor(RegressorMixin, LowMemEstimator):  # type: ignore[misc]
    """Trains a model of one value or several within a memory budget, as an estimator of scikit-learn; see `LowMemEstimator`.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.preprocessing import StandardScaler
        >>> x, y = load_diabetes(return_X_y=True)
        >>> model = LowMemRegressor(max_gpu_mem="100MB", lr=0.01, epochs=5, random_state=0, device="cpu")
        >>> make_pipeline(StandardScaler(), model).fit(x, y / 100).predict(x).shape
        (442,)
    """

    def fit(self, X: Any, y: Any) -> "LowMemRegressor":
        """Train on samples.

        Args:
            X: samples (N, features), or (N, ...) as the model takes them; numbers, which reach it as float32.
            y: values (N,) or (N, values), which are learnt as they are: scale them where they are far from 1.

        Raises:
            ValueError: they are no such arrays.
            LowMemError: a subclass that says what was wrong.
        """
        with self._fitted_unless_it_fails():
            x, y = self._checked(X, y, y_numeric=True, multi_output=True)
            y = np.asarray(y, dtype=np.float32)
            self._train(x, y, int(np.prod(y.shape[1:])), "regression")
        self._shape = y.shape[1:]
        return self

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Return values (N,) or (N, values), as they were in y.

        Args:
            X: samples, as `fit` takes them.
        """
        outputs = self._outputs(X).astype(np.float64)
        return outputs.reshape(len(outputs), *self._shape)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
