"""`compare`: one row per solver, from one start."""

import inspect
import math
from dataclasses import dataclass

import pytest
import torch

import ocnopt as oc
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.solvers.compare import compare
from ocnopt.solvers.ddp import DDP
from ocnopt.solvers.solution import Guess
from ocnopt.solvers.solve import solve
from ocnopt.staged import Stage, StagedOCP
from tests.oracles.compare import assert_close


def problem(**options):
    settings = {"initial_state": [1.0], "control_dim": 1, "horizon": 1.0} | options
    return OCP(lambda t, x, u: torch.sin(x) + u, lambda t, x, u: (x**2).sum(-1) + (u**2).sum(-1), **settings)


def test_rows_and_solutions():
    result = compare(
        problem(), (DDP("exact"), "ddp", DDP("gauss_newton", max_iterations=1)), steps=6, integrator="midpoint"
    )
    assert [row.solver for row in result.rows] == ["ddp", "ddp'", "ddp''"]
    assert list(result.solutions) == ["ddp", "ddp'", "ddp''"]
    first, second, third = result.rows
    alone = solve(problem(), DDP("exact"), steps=6, integrator="midpoint")
    assert first.cost == alone.cost.item() == result.solutions["ddp"].cost.item()
    assert first.horizon == 1.0
    assert first.iterations == alone.iterations.item()
    assert first.state_difference == 0.0
    assert second.state_difference < 1e-7
    difference = (result.solutions["ddp''"].states - alone.states).abs().max()
    assert_close(third.state_difference, difference)
    assert (first.converged, second.converged, third.converged) == (True, True, False)
    assert third.status.startswith("stopped after 1 step")
    assert first.wall_time > 0


def test_the_table():
    lines = str(compare(problem(), ("ddp", DDP(max_iterations=1)), steps=4)).splitlines()
    assert lines[0].split("  ")[0] == "solver"
    assert [
        word in lines[0] for word in ("cost", "T", "iterations", "time [s]", "build [s]", "max |dx|", "converged")
    ] == [True] * 7
    assert len(lines) == 3
    assert lines[1].startswith("ddp ")
    assert lines[1].endswith("yes")
    assert lines[2].endswith("no")


def test_all_solvers_get_the_same_start():
    guess = {"controls": torch.full((4, 1), 0.3)}
    result = compare(problem(), ("ddp", "ddp"), steps=4, initial_guess=guess)
    starts = [solution.history["cost"][0].item() for solution in result.solutions.values()]
    assert starts[0] == starts[1] != solve(problem(), steps=4).history["cost"][0].item()


def test_a_batch_with_a_free_end_time():
    free = problem(initial_state=[[1.0], [0.5]], horizon=FreeHorizon(1.0, 0.5, 2.0))
    result = compare(free, ("ddp", DDP("exact")), steps=4)
    ours = result.solutions["ddp"]
    assert_close(result.rows[0].cost, ours.cost.sum())
    assert result.rows[0].horizon == ours.horizon.max().item()
    assert result.rows[0].iterations == ours.iterations.max().item()
    assert result.rows[0].status == "; ".join(dict.fromkeys(ours.status))


def test_sizes_that_vary():
    stages = [
        Stage(lambda k, x, u: torch.cat([x, u], dim=-1), lambda k, x, u: (u**2).sum(-1), 1),
        Stage(lambda k, x, u: x + u, lambda k, x, u: (u**2).sum(-1), 2),
    ]
    result = compare(StagedOCP(stages, lambda x: ((x - 1) ** 2).sum(-1), initial_state=[0.5]), ("ddp", "ddp"))
    assert result.rows[1].state_difference == 0.0


def test_against_ipopt():
    result = oc.compare(problem(), steps=10)
    ddp, casadi = result.rows
    assert (ddp.solver, casadi.solver) == ("ddp", "casadi")
    assert casadi.cost == pytest.approx(ddp.cost, rel=1e-8)
    assert casadi.state_difference < 1e-5
    assert casadi.build_time > 0


class Refuses:
    """Takes no problem."""

    def solve(self, problem, guess, *, progress=False):
        raise oc.ProblemError("the problem is not for this solver")


def test_a_solver_that_refuses_has_a_row_with_the_reason():
    result = compare(problem(), (Refuses(), "casadi"), steps=4)
    refused, casadi = result.rows
    assert (refused.converged, casadi.converged) == (False, True)
    assert math.isnan(refused.cost)
    assert math.isnan(refused.state_difference)
    assert "not for this solver" in refused.status
    assert list(result.solutions) == ["casadi"]
    assert casadi.state_difference == 0.0
    assert str(result).splitlines()[-1].startswith("refuses: refused: the problem is not for this solver")


def test_where_all_refuse_the_first_reason_is_raised():
    with pytest.raises(oc.ProblemError, match="the problem is not for this solver"):
        compare(problem(), (Refuses(), Refuses()), steps=4)


@dataclass(frozen=True)
class Biased:
    """Solves from a start of its own."""

    start: float

    def solve(self, problem, guess, *, progress=False):
        del progress
        own = Guess([torch.full_like(u, self.start) for u in guess.controls], guess.parameters)
        return DDP().solve(problem, own)


def test_two_minima_are_marked():
    two = OCP(
        lambda t, x, u: u,
        lambda t, x, u: 0.01 * (u**2).sum(-1),
        lambda t, x: ((x**2 - 1) ** 2 + 0.3 * x).sum(-1),
        initial_state=[0.2],
        control_dim=1,
        horizon=1.0,
    )
    result = compare(two, (Biased(1.0), Biased(-1.0), Biased(1.0)), steps=4)
    assert [row.converged for row in result.rows] == [True] * 3
    assert [bool(row.note) for row in result.rows] == [False, True, False]
    assert result.rows[1].note.startswith("cost differs from biased's by 0.59")
    assert str(result).splitlines()[-1] == f"biased': {result.rows[1].note}"
    both = compare(two, (Biased(1.0), Biased(1.0)), steps=4)
    assert both.notes == ()


FOUR = ("ddp", "casadi", "indirect", "shooting")


def test_four_solvers_in_one_table():
    result = compare(problem(), FOUR, steps=20)
    assert [row.solver for row in result.rows] == list(FOUR)
    assert [row.converged for row in result.rows] == [True] * 4
    ddp, casadi, indirect, shooting = result.rows
    assert casadi.cost == pytest.approx(ddp.cost, rel=1e-8)
    assert shooting.cost == pytest.approx(ddp.cost, rel=1e-8)
    # constant controls cost a little more than the continuous optimum
    assert 0 < ddp.cost - indirect.cost < 1e-3
    assert (ddp.note, casadi.note, shooting.note) == ("", "", "")
    assert indirect.note.startswith("cost differs from ddp's by")
    assert indirect.note.endswith(": the same minimum of another discretisation")
    assert len(str(result).splitlines()) == 6


def test_four_solvers_on_the_pendulum_from_two_starts():
    pendulum = oc.problems.get("pendulum_swing_up").build()
    times = 4 / 100 * torch.arange(100, dtype=torch.float64)
    here = compare(pendulum, FOUR, steps=100)
    assert [row.converged for row in here.rows] == [True] * 4
    assert {round(row.cost, 6) for row in here.rows if row.solver != "indirect"} == {2.82803}
    assert [row.note.rsplit(": ")[-1] for row in here.rows] == [
        "",
        "",
        "the same minimum of another discretisation",
        "",
    ]
    there = compare(pendulum, FOUR, steps=100, initial_guess=0.5 * torch.cos(4.0 * times)[:, None])
    ddp, *others = there.rows
    assert ddp.cost == pytest.approx(2.82803, abs=1e-4)
    for row in others:
        assert row.converged
        near = abs(row.cost - ddp.cost) < 1e-2
        reason = "the same minimum of another discretisation" if near else "another local minimum"
        assert row.note.endswith(f": {reason}") or (near and row.solver != "indirect" and not row.note)
    assert "another local minimum" in str(there)


def test_mirror_images_are_marked():
    two = OCP(
        lambda t, x, u: u,
        lambda t, x, u: 0.01 * (u**2).sum(-1),
        lambda t, x: ((x**2 - 1) ** 2).sum(-1),
        initial_state=[0.0],
        control_dim=1,
        horizon=1.0,
    )
    note = compare(two, (Biased(1.0), Biased(-1.0)), steps=4, initial_guess=torch.ones(4, 1)).rows[1].note
    assert note == "another minimum of the same cost as biased's, such as a mirror image: the states differ"


def test_costs_near_zero_are_marked():
    tiny = OCP(
        lambda t, x, u: torch.sin(x) + u,
        lambda t, x, u: 1e-10 * ((x**2).sum(-1) + (u**2).sum(-1)),
        initial_state=[1.0],
        control_dim=1,
        horizon=1.0,
    )
    ddp, casadi = compare(tiny, steps=10).rows
    assert ddp.note == ""
    assert (ddp.converged, casadi.converged) == (True, True)
    assert casadi.note.startswith("cost differs from ddp's by")
    assert "so near zero pass the absolute tolerances of IPOPT before the minimum; scale the cost up" in casadi.note


def test_a_nan_is_not_dropped():
    @dataclass(frozen=True)
    class Lost:
        def solve(self, problem, guess, *, progress=False):
            del progress
            solution = DDP().solve(problem, guess)
            states = solution.states.clone()
            states[2] = math.nan
            return solution._replace(states=states, cost=torch.full_like(solution.cost, math.nan))

    row = compare(problem(), ("ddp", Lost()), steps=4).rows[1]
    assert math.isnan(row.state_difference)
    assert math.isnan(row.cost)


@pytest.mark.parametrize(
    ("solvers", "message"),
    [
        ("ddp", r"solvers is 'ddp'; expected several: write a tuple such as \('ddp', 'casadi'\)"),
        (DDP(), r"solvers is DDP; expected several: write a tuple"),
        (3, r"solvers is int; expected several: write a tuple"),
        ((), r"solvers is empty; expected one or more: write a tuple"),
        (("ddp", "dpp"), r"solver 'dpp' is unknown; .*did you mean 'ddp'\?"),
    ],
)
def test_what_is_no_sequence_of_solvers(solvers, message):
    with pytest.raises(oc.ProblemError, match=message):
        inspect.unwrap(compare)(problem(), solvers)


def test_a_saddle_is_no_minimum_and_an_empty_search_is_one():
    hill = OCP(
        lambda t, x, u: u,
        lambda t, x, u: 0.02 * (u**2).sum(-1),
        lambda t, x: ((x**2 - 1) ** 2).sum(-1),
        initial_state=[0.0],
        control_dim=1,
        horizon=1.0,
    )
    both = compare(hill, ("ddp", "shooting"), steps=10, initial_guess=torch.zeros(10, 1))
    assert both.notes[0] == "ddp: a saddle, no minimum; start elsewhere, or with restarts="
    settled = OCP(lambda t, x, u: -x, None, lambda t, x: (x**2).sum(-1), initial_state=[1.0], horizon=1.0)
    rows = compare(settled, ("ddp", "shooting"), steps=5).rows
    assert rows[0].cost == pytest.approx(rows[1].cost, rel=1e-12)
    assert rows[1].converged
