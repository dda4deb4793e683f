"""Solutions travel: pickled, copied, saved. What is built stays, and solves are not traced through, in words."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch

import ocnopt as oc
from ocnopt.errors import ConvergenceError, ProblemError
from ocnopt.ocp import FreeHorizon
from ocnopt.solvers.mpc import MPC
from ocnopt.solvers.solution import Solution, load_solution
from ocnopt.solvers.solve import prepare, solve
from ocnopt.staged import Stage, StagedOCP
from tests.oracles.compare import assert_close
from tests.solvers.cases import swing

F64 = torch.float64
NAMES = {
    "state_names": ("place [m]", "speed [m/s]"),
    "control_names": ("thrust [N]",),
    "constraint_names": ("limit", "goal"),
}


def sent(value):
    return pickle.loads(pickle.dumps(value))  # noqa: S301


def stored(value):
    """Through a file of torch's."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def limited(**changes):
    """A mass with a speed limit that has to arrive."""
    given = {"initial_state": [0.0, 0.0], "control_dim": 1, "horizon": 2.0, **NAMES, **changes}
    return oc.OCP(
        lambda t, x, u: torch.stack([x[..., 1], u[..., 0]], dim=-1),
        lambda t, x, u: (u**2).sum(-1),
        path_constraint=lambda t, x, u: x[..., 1:] - 0.8,
        terminal_constraint=lambda t, x: x[..., :1] - 1.0,
        **given,
    )


def assert_same(ours, theirs):
    """All of a Solution but its problem."""
    names = [f.name for f in dataclasses.fields(Solution)[:-2]]
    parts = [{name: getattr(s, name) for name in names} | {"history": dict(s.history)} for s in (ours, theirs)]
    leaves, shapes = zip(*(torch.utils._pytree.tree_flatten(part) for part in parts), strict=True)
    assert shapes[0] == shapes[1]
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) and not a.isnan().any() else str(a) == str(b)
    assert ours.violations == theirs.violations


@pytest.fixture(scope="module")
def stopped():
    """Two problems, neither of them finished, so that constraints are broken."""
    start = torch.tensor([[0.0, 0.0], [0.1, 0.2]], dtype=F64)
    return solve(limited(initial_state=start), steps=6, max_iterations=1)


@pytest.mark.parametrize("travel", [sent, stored, lambda value: sent(sent(value))])
def test_all_but_the_problem_travels(travel, stopped):
    assert len(stopped.violations) > 0
    assert set(stopped.multipliers) == {"path_constraint", "terminal_constraint"}
    other = travel(stopped)
    assert_same(other, stopped)
    assert (other.state_names, other.control_names) == (NAMES["state_names"], NAMES["control_names"])
    assert other.problem is None
    with pytest.raises(ProblemError, match="no problem to run"):
        other.rollout(stopped.states[..., 0, :])


def test_a_file_without_its_problem_holds_as_much(stopped, tmp_path):
    stopped.save(tmp_path / "s.pt")
    loaded = load_solution(tmp_path / "s.pt")
    assert_same(loaded, stopped)
    assert_same(sent(loaded), stopped)
    assert {axis.get_ylabel() for axis in loaded.plot().axes} >= {"place [m]", "thrust [N]"}
    with pytest.raises(ProblemError, match="has no problem"):
        _ = dataclasses.replace(loaded, _violations=None).violations


def test_sizes_that_vary_travel():
    stages = [
        Stage(lambda k, x, u: torch.cat([x, u], dim=-1), lambda k, x, u: (u**2).sum(-1), 1),
        Stage(lambda k, x, u: x, None, 0),
    ]
    solution = solve(StagedOCP(stages, lambda x: ((x - 1) ** 2).sum(-1), initial_state=[0.5]))
    assert_same(sent(solution), solution)


def test_what_travelled_is_a_start():
    solution = solve(swing(horizon=FreeHorizon(2.0, 1.0, 4.0)), steps=8)
    again = solve(solution.problem, initial_guess=sent(solution))
    assert int(again.iterations) <= 1
    assert_close(again.cost, solution.cost, rtol=1e-9)


def test_copies_share_the_problem_alone():
    solution = solve(swing(), steps=8)
    for other in (copy.copy(solution), copy.deepcopy(solution)):
        assert_same(other, solution)
        assert other.problem is solution.problem
        assert_close(other.rollout(solution.states[0]).states, solution.states, rtol=1e-12)
    other.states.zero_()
    other.history["cost"].zero_()
    other.gains.K.zero_()
    assert all(bool(v.any()) for v in (solution.states, solution.history["cost"], solution.gains.K))


def test_gradients_stay_in_a_copy_and_not_in_a_pickle():
    x0 = torch.tensor([0.8, 0.1], dtype=F64, requires_grad=True)
    solution = solve(swing(initial_state=x0), steps=8, differentiable=True)
    copied = copy.deepcopy(solution)
    assert torch.equal(*(torch.autograd.grad(s.cost, x0, retain_graph=True)[0] for s in (copied, solution)))
    assert not sent(solution).cost.requires_grad


def test_an_error_takes_its_solution_along():
    with pytest.raises(ConvergenceError) as caught:
        solve(swing(), steps=8, max_iterations=1, strict=True)
    again = sent(caught.value)
    assert str(again) == str(caught.value)
    assert_same(again.solution, caught.value.solution)


@pytest.mark.parametrize("leave", [pickle.dumps, copy.deepcopy, copy.copy])
def test_what_is_built_stays_where_it_is(leave):
    prepared = prepare(swing(), steps=3)
    with pytest.raises(
        ProblemError, match=r"a Prepared was to be pickled or copied; expected .*oc.prepare\(..\) again"
    ):
        leave(prepared)
    with pytest.raises(ProblemError, match=r"an MPC was to be pickled or copied; expected .*another with oc.MPC"):
        leave(MPC(prepared))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (torch.func.grad, "torch.func .* at work.*; expected plain tensors: .*differentiable=True"),
        (lambda f: lambda x: torch.func.vmap(f)(x[None]), "torch.func .* at work.*initial_state a leading batch axis"),
        (lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), "torch.func .* at work"),
    ],
)
def test_nothing_traces_through_a_solve(transform, message):
    prepared, x0 = prepare(swing(), steps=2), torch.tensor([0.8, 0.1], dtype=F64)
    controller = MPC(prepared)
    calls = {
        "an OCP": lambda x: solve(swing(initial_state=x), steps=2).cost,
        "a StagedOCP": lambda x: solve(prepared.problem.altered(initial_state=x)).cost,
        "a Prepared": lambda x: prepared.solve(x).cost,
        "an MPC": lambda x: controller(0.0, x)[0],
    }
    for call in calls.values():
        with pytest.raises(ProblemError, match=message):
            transform(call)(x0)


def test_a_solve_stays_out_of_what_is_compiled():
    problem, x0 = swing(), torch.ones(1, dtype=F64)

    def total(x, solving=solve):
        return solving(problem, steps=2).cost + x.sum()

    message = r"torch.compile was to trace .*; expected a call outside of it: use torch.compiler.disable\(oc.solve\)"
    with pytest.raises(ProblemError, match=message):
        torch.compile(total, backend="eager")(x0)
    apart = torch.compiler.disable(solve)
    assert_close(torch.compile(lambda x: total(x, apart), backend="eager")(x0), total(x0), rtol=1e-12)
