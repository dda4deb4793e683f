"""`compare`: one row per solver, from one start."""

import pytest
import torch

import ocnopt as oc
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.solvers.compare import compare
from ocnopt.solvers.ddp import DDP
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
