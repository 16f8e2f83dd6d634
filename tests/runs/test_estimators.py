"""Estimators of scikit-learn: in its searches, pipelines and pickles, and by its own checks."""

import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator, estimator_checks_generator
from torch import nn

import lowmem_pnn
from lowmem_pnn import LowMemClassifier, LowMemRegressor
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.inference.load import given_model

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(60, 4))
Y = np.where(X[:, 0] > 0, "yes", "no")
GIVEN: dict[str, Any] = {
    "max_gpu_mem": "300MB", "device": "cpu", "epochs": 5, "batch_size": 8, "lr": 0.05, "random_state": 0, "options": {"compare": False},
}  # fmt: skip

NET = """from torch import nn


def build(width):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
"""


def sized(num_features: int, num_outputs: int, width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(num_features, width), nn.ReLU(), nn.Linear(width, num_outputs))


def test_a_search_finds_what_learns() -> None:
    search = GridSearchCV(LowMemClassifier(sized, **GIVEN), {"lr": [1e-9, 0.05]}, cv=2).fit(X, Y)
    assert search.best_params_ == {"lr": 0.05}
    assert search.best_score_ > 0.8
    assert set(search.predict(X)) == {"no", "yes"}


def test_scores_of_a_pipeline() -> None:
    scores = cross_val_score(make_pipeline(StandardScaler(), LowMemRegressor(**{**GIVEN, "epochs": 20})), X, X[:, 1] * 2, cv=2)
    assert scores.min() > 0.7


def test_the_estimator_does_what_fit_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    net, argument = "net.py:build", {"model_arg": {"width": 8}}
    model = LowMemClassifier(net, workdir=tmp_path / "runs", **{**GIVEN, "options": {**GIVEN["options"], **argument}}).fit(X, Y)
    given = {name: GIVEN[name] for name in ("max_gpu_mem", "device", "epochs", "batch_size", "lr")}
    x, seed = X.astype(np.float32), int(np.random.RandomState(0).randint(2**31 - 1))
    result = lowmem_pnn.fit(
        net,
        (x, (Y == "yes").astype(int)),
        workdir=tmp_path / "run",
        method="exact",
        val_fraction=0.0,
        seed=seed,
        **given,
        **argument,
    )
    expected = torch.softmax(torch.tensor(lowmem_pnn.predict(result, x, model=net)["scores"], dtype=torch.float64), 1).numpy()
    np.testing.assert_allclose(model.predict_proba(X), expected, rtol=1e-12)
    assert (model.predict(X) == np.array(["no", "yes"])[expected.argmax(1)]).all()
    assert model.result_.method == "exact"
    assert [path.name[:4] for path in (tmp_path / "runs").iterdir()] == ["fit-"], "the run is kept where it was asked for"


@pytest.mark.parametrize("make", [lambda: sized, lambda: sized(4, 2), lambda: None], ids=["function", "model", "none"])
def test_a_model_is_left_as_it_was_given(make: Callable[[], Any]) -> None:
    given = make()
    before = {name: value.clone() for name, value in given.state_dict().items()} if isinstance(given, nn.Module) else {}
    model = LowMemClassifier(given, **GIVEN).fit(X, Y)
    assert model.get_params()["model"] is given
    for name, value in before.items():
        assert torch.equal(given.state_dict()[name], value)
    folder = Path(model.result_.workdir)
    again = pickle.loads(pickle.dumps(model))
    assert again.result_.history == model.result_.history != {}
    assert Path(again.result_.weights_file).is_file()
    assert model.result_.workdir not in again.result_.describe()
    kept = model.predict_proba(X)
    assert folder.is_dir(), "pickling leaves the run alone"
    del model
    assert not folder.exists(), "a temporary run goes with its estimator"
    gc.collect()
    assert given_model(folder, None) is None, "and so does the copy of its model"
    np.testing.assert_array_equal(again.predict_proba(X), kept)
    with pytest.raises(NotFittedError):
        clone(again).predict(X)


def test_whole_numbers_are_values_to_the_regressor() -> None:
    model = LowMemRegressor(lambda num_outputs: nn.Linear(4, num_outputs), **GIVEN).fit(X, np.arange(60) % 3)
    assert model.predict(X).shape == (60,)
    two = LowMemRegressor(**GIVEN).fit(X, np.stack([X[:, 0], X[:, 1]], axis=1))
    assert two.predict(X[:5]).shape == (5, 2)


def test_images_reach_the_model_in_their_shape() -> None:
    images = RANDOM.normal(size=(20, 1, 6, 6))
    # Options count before parameters, and a loss of one's own is no task.
    options = {
        **GIVEN["options"],
        "loss": lambda outputs, y: nn.functional.cross_entropy(outputs, y),
        "max_gpu_mem": "200MB",
        "verbose": False,
    }
    model = LowMemClassifier(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 2)), **{**GIVEN, "options": options})
    assert model.fit(images, np.arange(20) % 2).predict_proba(images).shape == (20, 2)
    assert (model.result_.budget_bytes, model.result_.task) == (200_000_000, "own")


def test_faults_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="y has one class, yes; a classifier needs two at least"):
        LowMemClassifier(**GIVEN).fit(X, np.full(60, "yes"))
    with pytest.raises(ConfigError, match="model is 3; give a model's name, a model, or a function that builds one"):
        LowMemClassifier(3, **GIVEN).fit(X, Y)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ends in 1 outputs, but the data set has 2 classes"):
        LowMemClassifier("mlp:4-1", workdir=tmp_path, **GIVEN).fit(X, Y)
    assert list(tmp_path.iterdir()) == [], "a fit that was not begun leaves no folder"
    with pytest.raises(ConfigError, match="options has 'model', which is given to the estimator itself; leave it out of options"):
        LowMemClassifier(**{**GIVEN, "options": {"model": "mlp:4-2"}}).fit(X, Y)
    more = LowMemClassifier("mlp:4-3", **GIVEN).fit(X, Y)
    with pytest.raises(ConfigError, match="the model gives 3 scores, and y had 2 classes; give one that gives 2"):
        more.predict(X)
    with pytest.raises(ConfigError, match="there is no option --nonsense"):
        more.set_params(options={"nonsense": 1}).fit(X[:, :3], np.arange(60) % 3)
    with pytest.raises(ConfigError, match="the model gives 3 scores, and y had 2 classes"):  # of the fit before, and its columns
        more.set_params(options=None).predict(X)


# Those that try what is ours: parameters, pickles, shapes and types of what is given and predicted. --all tries all of them.
_SHORT = (
    "check_no_attributes_set_in_init", "check_parameters_default_constructible", "check_get_params_invariance", "check_set_params",
    "check_estimators_unfitted", "check_dont_overwrite_parameters", "check_readonly_memmap_input", "check_estimators_nan_inf",
    "check_classifiers_one_label", "check_classifiers_regression_target", "check_regressors_int", "check_estimator_sparse_tag",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [LowMemClassifier, LowMemRegressor])
def test_scikit_learns_own_checks(kind: type[Any], all_cases: bool) -> None:
    estimator = kind(**{**GIVEN, "epochs": 20 if all_cases else 1, "random_state": None})
    if all_cases:
        found = check_estimator(estimator, on_fail=None, on_skip=None)
        assert {one["check_name"] for one in found if one["status"] == "skipped"} <= {
            "check_array_api_input"
        }  # torch takes arrays of numpy
        assert not [(one["check_name"], one["exception"]) for one in found if one["status"] == "failed"]
        return
    tried = [
        (each, check) for each, check in estimator_checks_generator(estimator) if getattr(check, "func", check).__name__ in _SHORT
    ]
    assert len(tried) >= 9
    for each, check in tried:
        check(each)
