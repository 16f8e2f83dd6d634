"""The classifier: classes by scikit-learn's interface, learnt within a memory budget."""

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.estimators.estimator import LowMemEstimator


class LowMemClassifier(ClassifierMixin, LowMemEstimator):  # type: ignore[misc]
    """Trains a classifier within a memory budget, as an estimator of scikit-learn; `LowMemEstimator` describes its parameters.

    Attributes:
        classes_: labels of the classes (classes,), in order.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> x, y = load_iris(return_X_y=True)
        >>> model = LowMemClassifier(max_gpu_mem="100MB", lr=0.01, epochs=5, random_state=0, device="cpu").fit(x, y)
        >>> bool(model.score(x, y) > 0.6), model.predict_proba(x).shape
        (True, (150, 3))
    """

    def fit(self, X: Any, y: Any) -> "LowMemClassifier":
        """Train on samples.

        Args:
            X: samples (N, features), or (N, ...) as the model takes them; numbers, which reach it as float32.
            y: labels (N,), of any kind.

        Raises:
            ValueError: they are no such arrays, or there is one class alone.
            LowMemError: a subclass that says what was wrong.
        """
        with self._fitted_unless_it_fails():
            x, y = self._checked(X, y)
            check_classification_targets(y)
            classes, numbers = np.unique(column_or_1d(y, warn=True), return_inverse=True)
            if len(classes) < 2:
                raise ValueError(f"y has one class, {classes[0]}; a classifier needs two at least")
            self._train(x, numbers.astype(np.int64), len(classes), "classification")
        self.classes_ = classes
        return self

    def predict_proba(self, X: Any) -> npt.NDArray[Any]:
        """Return probabilities (N, classes), in the order of `classes_`.

        Args:
            X: samples, as `fit` takes them.
        """
        scores = self._scores(X).astype(np.float64)
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities: npt.NDArray[Any] = powers / powers.sum(axis=1, keepdims=True)
        return probabilities

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Return labels (N,).

        Args:
            X: samples, as `fit` takes them.
        """
        numbers = self._scores(X).argmax(axis=1)  # which says first of all whether there was a fit
        labels: npt.NDArray[Any] = self.classes_[numbers]
        return labels

    def _scores(self, x: Any) -> npt.NDArray[Any]:
        """Return the model's scores (N, classes), which are logits."""
        scores = self._outputs(x)
        if scores.shape[1] != len(self.classes_):
            raise ConfigError(
                f"the model gives {scores.shape[1]} scores, and y had {len(self.classes_)} classes; give one that gives {len(self.classes_)}"
            )
        return scores
