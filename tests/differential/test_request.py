"""What a user can ask wrongly."""

import pytest
import torch

from ocnopt import checks
from ocnopt.differential.differentiate import differentiate
from ocnopt.differential.flow import read_request
from ocnopt.differential.hvp import hvp
from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, FreeHorizon
from tests.differential.cases import CASES


def one(**options):
    return OCP(
        lambda t, x, u, *p: -x,
        None,
        lambda t, x, *p: x[..., 0] ** 2,
        **{"initial_state": [1.0], "horizon": 1.0, **options},
    )


@pytest.mark.parametrize(
    ("problem", "options", "message"),
    [
        (one(), {"parameters": torch.ones(1)}, "parameters are given for a problem without any; expected none"),
        (
            one(parameters=[1.0]),
            {"parameters": torch.ones(2)},
            r"parameters have shape \(2,\); expected \(1,\).*without T",
        ),
        (one(parameters=[1.0]), {"parameters": torch.tensor([torch.nan])}, "parameters holds NaN"),
        (one(), {"horizon": 0.0}, r"horizon is 0.0; expected one end time T after the start 0.0"),
        (one(), {"controls": torch.ones(3, 1)}, "controls are given for a problem without any"),
        (
            one(control_dim=2),
            {},
            r"no controls are given for a problem with 2 staged ones; expected controls= \(\.\.\., N, 2\)",
        ),
        (one(control_dim=2), {"controls": torch.ones(3, 1)}, r"controls have shape \(3, 1\); expected \(N, 2\)"),
        (one(control_dim=1), {"controls": torch.ones(0, 1)}, r"controls have shape \(0, 1\); .* N >= 1"),
        (
            one(control_dim=1),
            {"controls": torch.ones(2, 3, 1)},
            r"expected \(N, 1\) or \(\*batch, N, 1\) with batch \(\)",
        ),
        (one(), {"rtol": 0.0}, "rtol is 0.0; expected a number > 0"),
        (one(), {"atol": -1e-3}, "atol is -0.001; expected a number > 0"),
    ],
)
def test_arguments_that_do_not_fit(problem, options, message):
    with pytest.raises(ProblemError, match=message):
        differentiate(problem, **options)


@pytest.mark.parametrize(
    ("problem", "v", "message"),
    [
        (one(), torch.ones(1), r"v has shape \(1,\); expected a problem with parameters or a FreeHorizon"),
        (one(parameters=[1.0, 2.0]), torch.ones(1), r"v has shape \(1,\); expected \(2,\): one entry per parameter"),
        (
            one(parameters=[1.0, 2.0], horizon=FreeHorizon(1.0, 0.5, 2.0)),
            torch.ones(2, 2),
            r"v has shape \(2, 2\); expected \(2,\) or \(3,\)",
        ),
    ],
)
def test_vectors_that_do_not_fit(problem, v, message):
    with pytest.raises(ProblemError, match=message):
        hvp(problem, None, v)


def test_something_else_than_a_problem():
    with pytest.raises(ProblemError, match="problem is function; expected an oc.OCP"):
        read_request(one, None, None, None, 1e-8, 1e-8)


def large():
    return OCP(lambda t, x, u, p: -x * p.mean(-1)[..., None], None, lambda t, x, p: x[..., 0] ** 2, initial_state=[1.0],
               parameters=torch.ones(400_000), horizon=1.0)  # fmt: skip


def test_dense_matrices_that_do_not_fit_are_refused_and_the_alternatives_work():
    problem, options = large(), {"rtol": 1e-4, "atol": 1e-4}
    with pytest.raises(
        ProblemError, match=r"dense pp \(400000, 400000\) .* GiB; expected less: use representation='low_rank'.*oc.hvp"
    ):
        differentiate(problem, **options)
    result = differentiate(problem, curvature="gauss_newton", representation="low_rank", **options)
    assert result.p_factors.shape == (1, 400_000)
    product = hvp(problem, None, problem.parameters, **options)
    # The cost is exp(-2 mean p).
    assert float(product[0]) == pytest.approx(4 * float(result.value) / 400_000, rel=1e-3)


def test_a_container_may_have_less_memory_than_its_machine(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(checks, "_CONTAINER_LIMIT", limit)
    machine = checks.total_memory(torch.device("cpu"))
    assert machine > 2**20
    for text, expected in (("max\n", machine), ("100\n", 100.0)):
        limit.write_text(text)
        assert checks.total_memory(torch.device("cpu")) == expected
    with pytest.raises(ProblemError, match="dense pp"):
        differentiate(CASES["parameters_only"]().problem)
