"""The digit images and their model: counts, split, standardisation, and what is said about broken data."""

import builtins
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ocnopt.errors import DataError, ProblemError
from ocnopt.ocp import FreeHorizon
from ocnopt.problems import learning_task
from ocnopt.problems.learning import digits
from ocnopt.problems.learning.images import ImageClassifier


def test_the_split():
    data = digits.load()
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == torch.float32
    assert data.train_labels.dtype == torch.int64
    # stratified: no class is more than one image away from its share
    share = torch.bincount(torch.cat([data.train_labels, data.test_labels])) * 360 / 1797
    assert (torch.bincount(data.test_labels) - share).abs().max() <= 1


def test_the_split_follows_from_the_seed():
    assert torch.equal(digits.load().test_labels, digits.load(seed=0).test_labels)
    assert not torch.equal(digits.load().test_labels, digits.load(seed=1).test_labels)


def test_no_image_is_in_both_parts():
    data = digits.load()
    # the data set itself holds no image twice
    together = torch.cat([data.train_images, data.test_images]).flatten(1)
    assert len(together.unique(dim=0)) == 1797


def test_standardisation():
    data = digits.load()
    assert abs(float(data.train_images.mean())) < 1e-3
    assert float(data.train_images.std()) == pytest.approx(1, abs=1e-3)
    raw = data.train_images * 0.3761 + 0.3053
    assert float(raw.min()) == pytest.approx(0, abs=1e-6)
    assert float(raw.max()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("size", [0, 9, 1790])
def test_a_test_size_that_leaves_a_class_out(size):
    with pytest.raises(ProblemError, match=f"test_size is {size}; expected a whole number from 10 to 1787"):
        digits.load(test_size=size)


def test_without_scikit_learn(monkeypatch):
    real = builtins.__import__

    def no_sklearn(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_sklearn)
    with pytest.raises(DataError, match=r"the digits need scikit-learn.*pip install 'ocnopt\[data\]'"):
        digits.load()


def test_a_truncated_file(monkeypatch):
    def truncated():
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")

    monkeypatch.setattr("sklearn.datasets.load_digits", truncated)
    with pytest.raises(DataError, match="could not read its digits .*end-of-stream.*expected an intact"):
        digits.load()


def test_other_data(monkeypatch):
    other = SimpleNamespace(images=np.zeros((5, 8, 8)), target=np.zeros(5))
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: other)
    with pytest.raises(DataError, match=r"shape \(5, 8, 8\).*expected \(1797, 8, 8\), values 0..16"):
        digits.load()


def test_the_model_has_the_published_size():
    model = learning_task("digits").build().make_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == 36_074
    assert model.stem[0].bias is None
    assert model.stem[2].bias is None
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_the_model_takes_a_free_horizon():
    model = ImageClassifier(FreeHorizon(initial=0.7, lower=0.1, upper=2.0))
    assert float(model.ode.T) == 0.7
    assert "ode.T" in model.state_dict()


def test_options_reach_the_neural_ode():
    model = ImageClassifier(method="rk4", steps=3)
    model(torch.zeros(2, 1, 8, 8))
    assert model.ode.statistics.forward == 12
