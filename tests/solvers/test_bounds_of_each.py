"""Bounds of each problem of a batch: every problem equals its own solve alone, and a dense quadratic program."""

from dataclasses import replace

import pytest
import torch

import ocnopt as oc
from ocnopt.errors import ProblemError
from ocnopt.solvers.lowered.kernel import LoweredKernel
from ocnopt.solvers.search import TorchKernel
from tests.oracles.constrained_lq import random_constrained_lq
from tests.solvers.cases import swing

F64, INFINITE, STEPS = torch.float64, float("inf"), 6
STARTS = torch.tensor([[-1.0, 0.1], [-1.5, 0.0], [0.5, -0.2]], dtype=F64)
UPPER = torch.tensor([0.1, 0.8, INFINITE], dtype=F64)[:, None, None]
LOWER = -torch.tensor([0.5, INFINITE, 0.3], dtype=F64)[:, None, None]
TAPER = torch.linspace(1.0, 0.5, STEPS, dtype=F64)[:, None]
KERNELS = {
    "torch": {"kernel": "torch"},
    "lowered": {"kernel": "lowered", "compile": False},
    "compiled": {"kernel": "lowered", "compile": True},
}


def own(bounds, i):
    return tuple(side if not isinstance(side, torch.Tensor) or side.ndim < 3 else side[i] for side in bounds)


@pytest.fixture(scope="module")
def alone():
    """The problems solved one by one."""
    pairs = [own((LOWER * TAPER, UPPER * TAPER), i) for i in range(len(STARTS))]
    return [oc.solve(swing(x0, control_bounds=b), steps=STEPS) for x0, b in zip(STARTS, pairs, strict=True)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_problem_is_its_own(kernel, alone, monkeypatch):
    monkeypatch.setattr(TorchKernel if kernel == "torch" else LoweredKernel, "window", 2)
    bounds = (LOWER * TAPER, UPPER * TAPER)
    whole = oc.solve(swing(STARTS, control_bounds=bounds), steps=STEPS, **KERNELS[kernel])
    assert bool(whole.converged.all()), whole.status
    assert kernel in whole.status[0]
    for i, single in enumerate(alone):
        torch.testing.assert_close(whole.controls[i], single.controls, rtol=0, atol=1e-8)
        torch.testing.assert_close(whole.gains.K[i], single.gains.K, rtol=0, atol=1e-6)
        assert int(whole.iterations[i]) == int(single.iterations)
    low, high = (side.expand(whole.controls.shape) for side in bounds)
    assert bool(((whole.controls >= low) & (whole.controls <= high)).all())
    assert bool(((whole.controls == low) | (whole.controls == high)).any(1).all())


def test_so_many_that_steps_are_numpy_calls():
    starts = STARTS.repeat(40, 1)
    upper = torch.rand(120, 1, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    problem = swing(starts, control_bounds=(-INFINITE, upper))
    whole, wanted = (oc.solve(problem, steps=4, **KERNELS[kernel]) for kernel in ("lowered", "torch"))
    torch.testing.assert_close(whole.controls, wanted.controls, rtol=0, atol=1e-8)
    assert bool((whole.controls == upper).any())


@pytest.mark.parametrize("solver", ["casadi", "shooting", "indirect"])
def test_solvers_that_take_one_after_another(solver):
    steps = 3 if solver == "indirect" else STEPS
    whole = oc.solve(swing(STARTS[:2], control_bounds=(LOWER[:2], UPPER[:2])), solver, steps=steps)
    assert bool(whole.converged.all()), whole.status
    single = oc.solve(swing(STARTS[1], control_bounds=own((LOWER, UPPER), 1)), solver, steps=steps)
    torch.testing.assert_close(whole.controls[1], single.controls, rtol=0, atol=1e-9)
    assert float(whole.controls[0].amax()) <= 0.1 + 1e-9 < float(whole.controls[1].amax())


def test_data_of_each_beside_bounds_of_each():
    """The torch kernel then works on the whole batch, the lowered one reads both from one row."""
    goal = torch.tensor([0.1, -0.3, 0.2], dtype=F64)

    def make(start, data):
        return oc.OCP(
            lambda t, x, u: torch.stack([x[..., 1], torch.sin(x[..., 0]) + u[..., 0]], dim=-1),
            lambda t, x, u: (x[..., 0] - data) ** 2 + 0.1 * (u**2).sum(-1),
            initial_state=start,
            control_dim=1,
            horizon=1.5,
            control_bounds=(LOWER, UPPER),
            data=(data,),
        )

    answers = [oc.solve(make(STARTS, goal), steps=STEPS, **options) for options in KERNELS.values()]
    answers.append(oc.solve(make(STARTS, goal), "casadi", steps=STEPS))
    for answer in answers[1:]:
        torch.testing.assert_close(answer.controls, answers[0].controls, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kernel", "m"), [("torch", 3), ("lowered", 1), ("lowered", 3), ("compiled", 2)])
def test_dense_quadratic_programs(kernel, m):
    problem = random_constrained_lq(7 * m, 5, 3, m, bounded=False, paths=0, ends=0)
    generator = torch.Generator().manual_seed(m)
    starts = torch.randn(3, 3, generator=generator, dtype=F64)
    high = torch.rand(3, 5, m, generator=generator, dtype=F64)
    low = -torch.rand(3, 5, m, generator=generator, dtype=F64)
    low[1, :, 0], high[2] = -INFINITE, INFINITE
    batch = problem.free.staged(initial_state=starts, control_bounds=(low, high))
    solution = oc.solve(batch, **KERNELS[kernel])
    for i in range(3):
        finite = (low[i].clamp(min=-1e3), high[i].clamp(max=1e3))
        alone = replace(problem, free=replace(problem.free, x0=starts[i]), bounds=finite)
        controls, cost, _, _ = alone.solve()
        torch.testing.assert_close(solution.controls[i], torch.from_numpy(controls), rtol=0, atol=1e-7)
        assert float(solution.cost[i]) == pytest.approx(cost, rel=1e-9)


@pytest.mark.parametrize("kernel", ["torch", "lowered"])
def test_bounds_on_states(kernel):
    low = torch.tensor([[-INFINITE, -0.2], [-9.0, -INFINITE]], dtype=F64)[:, None]
    high = torch.tensor([[INFINITE, INFINITE], [INFINITE, 0.2]], dtype=F64)[:, None]
    bounds = (low, high * TAPER[[0, *range(STEPS)]])
    problem = swing(torch.tensor([[0.9, 0.0], [-1.3, 0.1]], dtype=F64), state_bounds=bounds)
    whole, reference = oc.solve(problem, steps=STEPS, **KERNELS[kernel]), oc.solve(problem, "casadi", steps=STEPS)
    assert bool(whole.converged.all()), whole.status
    single = oc.solve(swing(problem.initial_state[1], state_bounds=own(bounds, 1)), "casadi", steps=STEPS)
    torch.testing.assert_close(reference.states[1], single.states, rtol=0, atol=1e-9)
    torch.testing.assert_close(whole.states, reference.states, rtol=0, atol=1e-6)
    mine, theirs = (s.multipliers["state_bounds"] for s in (whole, reference))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert bool((theirs.abs() > 1e-2).any(1).any(1).all())


@pytest.mark.parametrize("kernel", ["torch", "lowered"])
def test_bounds_on_parameters_and_a_free_end(kernel, monkeypatch):
    monkeypatch.setattr(TorchKernel if kernel == "torch" else LoweredKernel, "window", 2)

    def make(start, **options):
        return oc.OCP(
            lambda t, x, u, p: torch.stack([x[..., 1], u[..., 0] + p[..., 0]], dim=-1),
            lambda t, x, u, p: (u**2).sum(-1) + 0.1 * (p[..., 0] + 2) ** 2,
            lambda t, x, p: t + 9 * (x**2).sum(-1),
            initial_state=start,
            control_dim=1,
            parameters=[0.3],
            horizon=oc.FreeHorizon(2.0, 0.3, 5.0),
            **options,
        )

    low = torch.tensor([-0.1, 0.4, -3.0], dtype=F64)[:, None]
    whole = oc.solve(make(STARTS, parameter_bounds=(low, 0.5)), steps=STEPS, **KERNELS[kernel])
    reference = oc.solve(make(STARTS, parameter_bounds=(low, 0.5)), "casadi", steps=STEPS)
    single = oc.solve(make(STARTS[0], parameter_bounds=(-0.1, 0.5)), steps=STEPS)
    torch.testing.assert_close(whole.parameters[0], single.parameters, rtol=0, atol=1e-7)
    torch.testing.assert_close(whole.parameters, reference.parameters, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.horizon, reference.horizon, rtol=0, atol=1e-5)
    assert int((whole.parameters == low).sum()) >= 2
    assert whole.violations == ()


def test_what_a_solution_does_with_them(tmp_path):
    bounds = (LOWER * TAPER, UPPER * TAPER)
    solution = oc.solve(swing(STARTS, control_bounds=bounds), steps=STEPS)
    assert solution.control_bounds[0].shape == (3, STEPS, 1)
    far = torch.full((3, 2), 50.0, dtype=F64)
    for k in (0, STEPS - 1):
        u = solution.policy(solution.times[..., k], far)
        low, high = (side.expand(3, STEPS, 1)[:, k] for side in bounds)
        assert bool(((u >= low) & (u <= high)).all())
        assert bool(((u == low) | (u == high)).any())
    closed = solution.rollout(STARTS + 0.3)
    assert float(closed.constraint_violation.max()) == 0.0
    solution.plot(tmp_path / "picture.png")
    solution.save(tmp_path / "solution.pt")
    loaded = oc.load_solution(tmp_path / "solution.pt", problem=solution.problem)
    torch.testing.assert_close(loaded.control_bounds, solution.control_bounds)
    other = oc.transcribe(swing(STARTS, control_bounds=(bounds[0] - 0.1, bounds[1])), STEPS)
    with pytest.raises(oc.DataError, match="another problem, by its bounds"):
        oc.load_solution(tmp_path / "solution.pt", problem=other)


def test_a_broken_bound_is_that_of_its_problem():
    loose = oc.solve(swing(STARTS), steps=STEPS)
    staged = oc.transcribe(swing(STARTS, control_bounds=(LOWER * TAPER, UPPER * TAPER)), STEPS)
    broken = replace(loose, problem=staged).violations
    low, high = (side.expand(3, STEPS, 1) for side in (LOWER * TAPER, UPPER * TAPER))
    excess = torch.maximum(low - loose.controls, loose.controls - high)
    worst = broken[0]
    assert worst.value == pytest.approx(float(excess.max()))
    assert float(excess[worst.problem[0], worst.step, 0]) == pytest.approx(worst.value)
    assert len(broken) == int((excess > 1e-6).sum()) > 4


def test_compare_and_a_control_loop():
    problem = swing(STARTS, control_bounds=(LOWER, UPPER))
    table = oc.compare(problem, ("ddp", "casadi"), steps=STEPS)
    assert max(row.state_difference for row in table.rows) < 1e-5
    loop = oc.MPC(oc.prepare(problem, steps=STEPS, compile=False)).simulate(STARTS, 2)
    single = swing(STARTS[0], control_bounds=own((LOWER, UPPER), 0))
    wanted = oc.MPC(oc.prepare(single, steps=STEPS, compile=False)).simulate(STARTS[0], 2)
    torch.testing.assert_close(loop.controls[0], wanted.controls, rtol=0, atol=1e-7)


def test_experiments_with_one_parameter():
    def make(**options):
        return oc.OCP(
            lambda t, x, u, p: torch.stack([x[..., 1], p[..., 0] * u[..., 0]], dim=-1),
            lambda t, x, u, p: (x**2).sum(-1) + (u**2).sum(-1) + (p[..., 0] - 1) ** 2,
            initial_state=STARTS,
            control_dim=1,
            parameters=[0.5],
            horizon=1.5,
            **options,
        )

    problem = make(control_bounds=(LOWER, UPPER))
    pair = [oc.solve(problem, s, steps=STEPS, shared_parameters=True) for s in ("ddp", "casadi")]
    torch.testing.assert_close(pair[0].controls, pair[1].controls, rtol=0, atol=1e-6)
    assert bool((pair[0].controls >= LOWER).all())
    bounded = make(state_bounds=([-INFINITE, -0.1], INFINITE))
    found = oc.solve(bounded, "casadi", steps=STEPS, shared_parameters=True)
    along = make(path_constraint=lambda t, x, u, p: -0.1 - x[..., 1:] - 9 * (t == 0).to(x)[..., None])
    wanted = oc.solve(along, "casadi", steps=STEPS, shared_parameters=True)
    torch.testing.assert_close(found.states, wanted.states, rtol=0, atol=1e-6)
    assert found.multipliers["state_bounds"].shape == (3, STEPS + 1, 2)
    assert wanted.multipliers["path_constraint"].shape == (3, STEPS + 1, 1)
    torch.testing.assert_close(
        -found.multipliers["state_bounds"][..., 1:], wanted.multipliers["path_constraint"], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ProblemError, match="parameter_bounds for each problem, but p is one for all"):
        oc.solve(make(parameter_bounds=(torch.zeros(3, 1), 9.0)), steps=STEPS, shared_parameters=True)
    with pytest.raises(ProblemError, match="the problem has state_bounds; solver 'ddp' has no multipliers"):
        oc.solve(bounded, steps=STEPS, shared_parameters=True)
