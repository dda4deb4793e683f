"""The error types: each is ours, and each is also the builtin that a caller would expect to catch."""

import pytest

import ocnopt as oc


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (oc.ProblemError, ValueError),
        (oc.NonFiniteError, ArithmeticError),
        (oc.ConvergenceError, RuntimeError),
        (oc.DataError, Exception),
    ],
)
def test_an_error_is_ours_and_a_builtin(kind, builtin):
    with pytest.raises(oc.OcnoptError):
        raise kind("message")
    with pytest.raises(builtin):
        raise kind("message")


def test_no_error_is_another():
    kinds = [oc.ProblemError, oc.DataError, oc.NonFiniteError, oc.ConvergenceError]
    for kind in kinds:
        assert [other for other in kinds if issubclass(kind, other)] == [kind]
