"""The checks of the package's annotations, which run with every test, do bite."""

import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation, BeartypeCallHintReturnViolation

from ocnopt.integrate.runge_kutta import combine
from ocnopt.ocp import Horizon
from ocnopt.runs import RunFolder
from tests.annotations import checked


@pytest.mark.parametrize(
    "call",
    [lambda: combine("state", 0.1, (), ()), lambda: RunFolder.open("a string"), lambda: Horizon(0.0, "one")],
    ids=["function", "class method", "dataclass"],
)
def test_a_wrong_argument_is_noticed(call):
    with pytest.raises(BeartypeCallHintParamViolation):
        call()


def test_a_wrong_result_is_noticed():
    @checked
    def wrong() -> torch.Tensor:
        return 1

    with pytest.raises(BeartypeCallHintReturnViolation):
        wrong()


def test_what_is_imported_for_type_checkers_only_is_left_out():
    @checked
    def function(a: "NothingOfThisName", b: int) -> None:  # noqa: F821
        pass

    function(1, 2)
    with pytest.raises(BeartypeCallHintParamViolation):
        function(1, "two")
