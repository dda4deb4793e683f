"""DDP on many problems at once, and on stages of varying size."""

import pytest
import scipy.linalg
import scipy.optimize
import torch

from ocnopt.ocp import OCP
from ocnopt.paths import rollout
from ocnopt.solvers.solve import solve
from ocnopt.staged import Stage, StagedOCP
from tests.oracles.compare import assert_close
from tests.solvers.cases import assert_converged, swing


@pytest.fixture(scope="module")
def starts():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(12, 2, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 1.0])


class TestBatch:
    def test_twelve_problems_are_twelve_solves(self, starts):
        together = solve(swing(starts, control_bounds=(-3.0, 2.0)), steps=8, integrator="euler")
        assert_converged(together)
        assert len(set(together.iterations.tolist())) > 2
        for i, x0 in enumerate(starts):
            alone = solve(swing(x0, control_bounds=(-3.0, 2.0)), steps=8, integrator="euler")
            assert_close(together.cost[i], alone.cost, rtol=1e-12)
            assert_close(together.states[i], alone.states, rtol=1e-8, atol=1e-9)
            assert_close(together.gains.K[i], alone.gains.K, rtol=1e-6, atol=1e-7)
            assert together.iterations[i] == alone.iterations
            assert together.status[i] == alone.status

    def test_two_leading_axes(self, starts):
        flat = solve(swing(starts[:4]), steps=10)
        grid = solve(swing(starts[:4].reshape(2, 2, 2)), steps=10)
        assert_close(grid.states, flat.states.reshape(2, 2, 11, 2), rtol=1e-12)
        assert len(grid.status) == 4

    def test_a_batch_of_one(self, starts):
        one, alone = solve(swing(starts[:1]), steps=10), solve(swing(starts[0]), steps=10)
        assert_close(one.states[0], alone.states, rtol=1e-12)
        assert one.status == [alone.status]

    def test_captured_data_belongs_to_its_problem(self):
        target = torch.tensor([[0.5], [1.0], [-2.0]]).double()

        def problem(goal):
            return OCP(
                lambda t, x, u: torch.sin(x) + u,
                lambda t, x, u: ((x - goal) ** 2).sum(-1) + (u**2).sum(-1),
                initial_state=torch.zeros_like(goal),
                control_dim=1,
                horizon=1.0,
            )

        together = solve(problem(target), steps=10)
        for i in range(3):
            assert_close(together.states[i], solve(problem(target[i]), steps=10).states, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("m", [1, 2])
    @pytest.mark.parametrize("q", [0, 1])
    def test_one_that_is_not_finite_is_given_up_alone(self, m, q):
        def problem(x0):
            return OCP(
                lambda t, x, u, *p: x**3 + u.sum(-1, keepdim=True) + sum(p),
                lambda t, x, u, *p: (x**2).sum(-1) + (u**2).sum(-1) + sum((v**2).sum(-1) for v in p),
                initial_state=x0,
                control_dim=m,
                control_bounds=(-2.0, 2.0),
                parameters=[0.1] if q else None,
                horizon=1.0,
            )

        together = solve(problem([[0.5], [100.0], [-0.3]]), steps=20)
        assert together.converged.tolist() == [True, False, True]
        assert together.status[1] == "given up: the first path is not finite; pass another initial_guess"
        for i, x0 in ((0, [0.5]), (2, [-0.3])):
            alone = solve(problem(x0), steps=20)
            assert_close(together.cost[i], alone.cost, rtol=1e-12)
            assert_close(together.states[i], alone.states, rtol=1e-9)
            assert together.iterations[i] == alone.iterations


class TestStages:
    def stages(self):
        grow = Stage(lambda k, x, u: torch.cat([torch.sin(x), u], dim=-1), lambda k, x, u: (u**2).sum(-1), 1)
        mix = Stage(lambda k, x, u: x * x.flip(-1) + u, lambda k, x, u: (k + 1) * (u**2).sum(-1), 2)
        rest = Stage(lambda k, x, u: x.sum(-1, keepdim=True), None, 0)
        return [grow, mix, mix, rest, grow]

    def test_sizes_may_vary(self):
        problem = StagedOCP(self.stages(), lambda x: ((x - 1) ** 2).sum(-1), initial_state=[0.5])
        solution = solve(problem, initial_guess=[torch.full((m,), 0.3) for m in (1, 2, 2, 0, 1)])
        assert_converged(solution)
        assert [x.shape[-1] for x in solution.states] == [1, 2, 2, 2, 1, 2]
        assert [u.shape[-1] for u in solution.controls] == [1, 2, 2, 0, 1]
        assert [tuple(K.shape) for K in solution.gains.K] == [(1, 1), (2, 2), (2, 2), (0, 2), (1, 1)]
        assert [p.shape[-1] for p in solution.costates] == [1, 2, 2, 2, 1, 2]
        sizes = [1, 2, 2, 0, 1]

        def cost(v):
            variables = torch.from_numpy(v).requires_grad_()
            value = rollout(problem, variables.split(sizes), problem.initial_state).cost
            (gradient,) = torch.autograd.grad(value, variables)
            return value.item(), gradient.numpy()

        start = torch.cat(list(solution.controls)).numpy() + 0.01
        theirs = scipy.optimize.minimize(cost, start, jac=True, options={"gtol": 1e-9})
        assert_close(solution.cost, theirs.fun, rtol=1e-9)

    @pytest.mark.parametrize("starts", [[0.5], [[0.5], [-0.3]]])
    def test_a_rollout_goes_by_step(self, starts):
        box = (-0.2, 0.2)
        problem = StagedOCP(self.stages(), lambda x: ((x - 1) ** 2).sum(-1), initial_state=starts, control_bounds=box)
        solution = solve(problem)
        again = solution.rollout(problem.initial_state)
        for ours, theirs in zip((*again.states, *again.controls), (*solution.states, *solution.controls), strict=True):
            assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert_close(again.cost, solution.cost, rtol=1e-12)
        moved = solution.rollout(problem.initial_state + 0.1, disturbance=lambda t, x: 0.01 * torch.ones_like(x))
        for k in range(5):
            deviation = moved.states[k] - solution.states[k]
            u = solution.controls[k] + (solution.gains.K[k] @ deviation[..., None])[..., 0]
            assert_close(moved.controls[k], u.clamp(*box), rtol=1e-12, atol=1e-12)
        assert [x.shape[-1] for x in moved.states] == [1, 2, 2, 2, 1, 2]

    def test_a_batch_of_them(self):
        starts = torch.tensor([[0.5], [-0.3], [1.0]]).double()
        together = solve(StagedOCP(self.stages(), lambda x: ((x - 1) ** 2).sum(-1), initial_state=starts))
        for i in range(3):
            alone = solve(StagedOCP(self.stages(), lambda x: ((x - 1) ** 2).sum(-1), initial_state=starts[i]))
            assert_close(together.cost[i], alone.cost, rtol=1e-12)

    def test_the_same_stage_listed_or_repeated(self):
        stage = Stage(lambda k, x, u: torch.sin(x) + u, lambda k, x, u: (x**2).sum(-1) + (u**2).sum(-1), 1)
        listed = solve(StagedOCP([stage] * 6, initial_state=[2.0]))
        repeated = solve(StagedOCP(stage, initial_state=[2.0], steps=6))
        assert_close(listed.states, repeated.states, rtol=1e-12)
        assert listed.iterations == repeated.iterations

    def test_static_controls_of_a_discrete_problem(self):
        stage = Stage(lambda k, x, u, p: x + p * u, lambda k, x, u, p: (u**2).sum(-1), 1)
        problem = StagedOCP(
            stage,
            lambda x, p: (x[..., 0] - 3) ** 2 + 0.1 * (p[..., 0] - 1) ** 4,
            initial_state=torch.zeros(2, 1),
            steps=4,
            parameters=[1.0],
        )
        solution = solve(problem, initial_guess=torch.full((4, 1), 0.5))
        assert_converged(solution)
        p, u = solution.parameters, solution.controls
        path = rollout(problem, u.unbind(-2), problem.initial_state, p)
        assert_close(solution.cost, path.cost)
        assert float(p.min()) > 1.0
