"""The comparison must fail where numbers differ, and say where."""

import numpy as np
import pytest
import torch

from tests.oracles.compare import assert_close, relative_error


def test_equal_values_of_any_kind_pass():
    assert_close(torch.tensor([1.0, 2.0]), np.array([1.0, 2.0]))
    assert_close(torch.tensor(3.0, requires_grad=True), 3.0)
    assert_close([np.inf, np.nan], torch.tensor([np.inf, np.nan]))
    assert_close(torch.zeros(0, 3), np.zeros((0, 3)))


def test_the_worst_entry_is_named_with_both_values():
    actual = torch.tensor([[1.0, 2.0], [3.0, 4.5]], dtype=torch.float64)
    expected = torch.tensor([[1.0, 2.1], [3.0, 4.0]], dtype=torch.float64)
    with pytest.raises(
        AssertionError, match=r"2 of 4 entries differ; worst at \(1, 1\): actual 4.5, expected 4, error 0.5"
    ):
        assert_close(actual, expected, rtol=1e-3)


def test_tolerances_add():
    assert_close(1.0 + 1.9e-3, 1.0, rtol=1e-3, atol=1e-3)
    with pytest.raises(AssertionError, match=r"allowed rtol 0\.001, atol 0\.001"):
        assert_close(1.0 + 2.1e-3, 1.0, rtol=1e-3, atol=1e-3)


def test_shapes_never_broadcast():
    with pytest.raises(AssertionError, match=r"shapes differ: actual \(3,\), expected \(\)"):
        assert_close(torch.ones(3), 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_sided_non_finite_values_fail(bad):
    with pytest.raises(AssertionError, match=r"worst at \(1,\)"):
        assert_close([1.0, bad], [1.0, 2.0], rtol=1e9)
    with pytest.raises(AssertionError, match=r"worst at \(1,\)"):
        assert_close([1.0, 2.0], [1.0, bad], rtol=1e9)


def test_relative_error_is_norm_wise():
    assert relative_error([1.0, 100.0], [2.0, 100.0]) == pytest.approx(0.01)
    assert relative_error([0.0], [0.0]) == 0.0
    assert relative_error([1.0], [0.0]) == np.inf
