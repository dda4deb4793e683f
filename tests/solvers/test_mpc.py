"""Closed loops: against the infinite-horizon regulator, with references, delays, faults and interruptions."""

import signal

import pytest
import scipy.linalg
import torch

from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.solvers.mpc import MPC
from ocnopt.solvers.solve import prepare
from ocnopt.staged import Stage, StagedOCP

F64 = torch.float64
A = torch.tensor([[1.0, 0.1], [0.0, 1.0]], dtype=F64)
B = torch.tensor([[0.005], [0.1]], dtype=F64)
STATE_WEIGHT, CONTROL_WEIGHT = torch.eye(2, dtype=F64), torch.eye(1, dtype=F64)
SOLUTION = torch.from_numpy(scipy.linalg.solve_discrete_are(A, B, STATE_WEIGHT, CONTROL_WEIGHT))
GAIN = torch.linalg.solve(CONTROL_WEIGHT + B.T @ SOLUTION @ B, B.T @ SOLUTION @ A)


def regulator(batch=(), target=None, **options):
    """Steps of a double integrator whose terminal cost is the Riccati solution: each plan's first control is LQR's."""
    data = () if target is None else (target,)
    goal = torch.zeros(2, dtype=F64) if target is None else target

    def cost(k, x, u):
        e = x - goal
        return (e * (e @ STATE_WEIGHT)).sum(-1) + (u**2).sum(-1)

    problem = StagedOCP(
        Stage(lambda k, x, u: x @ A.T + u @ B.T, cost, control_dim=1),
        lambda x: ((x - goal) * ((x - goal) @ SOLUTION)).sum(-1),
        initial_state=torch.ones(*batch, 2),
        steps=6,
        data=data,
    )
    return prepare(problem, **{"kernel": "lowered", **options})


def lqr_states(start, steps, push=None):
    x, states = torch.tensor(start, dtype=F64), [torch.tensor(start, dtype=F64)]
    for i in range(steps):
        x = A @ x - B @ GAIN @ x + (0 if push is None else push(i))
        states.append(x)
    return torch.stack(states)


@pytest.mark.parametrize("options", [{"kernel": "torch"}, {"kernel": "lowered"}, {"solver": "casadi", "kernel": None}])
def test_the_loop_of_a_linear_regulator_is_the_riccati_loop(options):
    options = {name: value for name, value in options.items() if value is not None}
    prepared = regulator() if "solver" not in options else prepare(regulator().problem, "casadi")
    loop = MPC(prepared).simulate([1.0, -0.5], 20)
    torch.testing.assert_close(loop.states, lqr_states([1.0, -0.5], 20), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loop.controls[:, 0], -(loop.states[:-1] @ GAIN.T)[:, 0], rtol=1e-6, atol=1e-7)
    assert loop.times.shape == (21,)
    assert bool(loop.converged.all())
    assert bool((loop.solve_times > 0).all())
    assert loop.status == "ran all of 20 steps; every solve converged"


@pytest.mark.parametrize("every", [1, 3, 6])
def test_feedback_between_solves_answers_a_disturbance_as_a_solve_would(every):
    push = lambda i: torch.tensor([0.1, -0.2], dtype=F64) * (i % 4 == 1)  # noqa: E731
    mpc = MPC(regulator(), every=every)
    loop = mpc.simulate([1.0, 0.0], 18, disturbance=lambda t, x: push(round(float(t)) - 1))
    torch.testing.assert_close(loop.states, lqr_states([1.0, 0.0], 18, push), rtol=1e-6, atol=1e-7)
    assert int((~loop.solve_times.isnan()).sum()) == -(-18 // every)


def test_without_feedback_the_plan_is_followed_blindly():
    push = lambda t, x: torch.tensor([0.0, 0.3], dtype=F64)  # noqa: E731
    ends = [
        MPC(regulator(), every=6, feedback=feedback).simulate([1.0, 0.0], 6, disturbance=push).states[-1]
        for feedback in (True, False)
    ]
    torch.testing.assert_close(ends[0], lqr_states([1.0, 0.0], 6, lambda i: torch.tensor([0.0, 0.3]).double())[-1])
    assert float(ends[1].norm()) > 1.3 * float(ends[0].norm())


def test_a_reference_that_moves_is_written_by_update():
    target, seen = torch.zeros(2, dtype=F64), []

    def update(t):
        seen.append(t)
        target[0] = 1.0 if t >= 10 else 0.0

    with pytest.warns(UserWarning, match="stationary"):
        loop = MPC(regulator(target=target), update=update).simulate([0.0, 0.0], 60)
    torch.testing.assert_close(loop.states[:11], torch.zeros(11, 2, dtype=F64), atol=1e-7, rtol=0)
    assert float((loop.states[-1] - torch.tensor([1.0, 0.0], dtype=F64)).abs().max()) < 0.05
    assert seen == [float(i) for i in range(60)]


def test_a_delay_is_made_up_for_by_prediction():
    """Without disturbances the plan for the predicted state is the plan for the true one, whoever asks when."""
    mpc = MPC(regulator(), delay=2)
    loop = mpc.simulate([1.0, -0.5], 20)
    torch.testing.assert_close(loop.states, lqr_states([1.0, -0.5], 20), rtol=1e-6, atol=1e-7)
    assert mpc.begins == 19.0
    blind = MPC(regulator(), delay=2, feedback=False, every=3)
    push = lambda t, x: torch.tensor([0.0, 0.2], dtype=F64) * float(t < 5)  # noqa: E731
    assert float(blind.simulate([1.0, 0.0], 80, disturbance=push).states[-1].norm()) < 0.1


def test_a_batch_runs_in_step():
    start = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]], dtype=F64)
    loop = MPC(regulator(batch=(3,))).simulate(start, 8)
    assert loop.states.shape == (3, 9, 2)
    assert loop.controls.shape == (3, 8, 1)
    assert loop.costs.shape == loop.converged.shape == (3, 8)
    for i in range(3):
        torch.testing.assert_close(loop.states[i], lqr_states(start[i].tolist(), 8), rtol=1e-6, atol=1e-7)


def test_a_plant_of_ones_own_is_the_one_that_moves():
    loop = MPC(regulator()).simulate([1.0, 0.0], 5, plant=lambda t, x, u: [0.5 * x[0], t])
    torch.testing.assert_close(loop.states[1:, 0], 0.5 ** torch.arange(1, 6, dtype=F64))
    torch.testing.assert_close(loop.states[1:, 1], torch.arange(5, dtype=F64))


def test_a_plant_that_breaks_ends_the_record():
    loop = MPC(regulator()).simulate([1.0, 0.0], 9, plant=lambda t, x, u: x * (float("nan") if t >= 3 else 1.0))
    assert loop.states.shape == (4, 2)
    assert loop.controls.shape == (3, 1)
    assert loop.status.startswith("the plant left the finite numbers after t = 3")


def test_ctrl_c_ends_the_record():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:

        def plant(t, x, u):
            if t == 4:
                signal.raise_signal(signal.SIGINT)
            return x

        loop = MPC(regulator()).simulate([1.0, 0.0], 9, plant=plant)
    finally:
        signal.signal(signal.SIGINT, before)
    # the step that was under way is finished
    assert loop.states.shape == (6, 2)
    assert loop.status.startswith("interrupted at t = 5")


def test_a_free_end_time_runs_out_with_the_clock():
    problem = OCP(
        lambda t, x, u: torch.stack([x[..., 1], u[..., 0]], dim=-1),
        lambda t, x, u: 1.0 + 0.1 * (u**2).sum(-1),
        lambda t, x: 100 * (x**2).sum(-1),
        initial_state=[1.0, 0.0],
        control_dim=1,
        horizon=FreeHorizon(3.0, 0.3, 6.0),
    )
    mpc = MPC(prepare(problem, steps=15))
    x, t, ends = torch.tensor([1.0, 0.0], dtype=F64), 0.0, []
    for _ in range(4):
        u = mpc(t, x)
        ends.append(t + float(mpc.plan.horizon))
        h = 0.1
        x = torch.stack([x[0] + h * x[1] + 0.5 * h**2 * u[0], x[1] + h * u[0]])
        t += h
        mpc.every = 1
    assert max(ends) - min(ends) < 0.05


def test_solves_without_a_finite_path_keep_the_old_plan():
    """The field leaves the numbers beyond x = 2; the measured state does for one step."""
    problem = OCP(
        lambda t, x, u: u,
        lambda t, x, u: (u**2).sum(-1) - torch.log(2 - x[..., 0]) + (x**2).sum(-1),
        initial_state=[0.5],
        control_dim=1,
        horizon=1.0,
    )
    mpc = MPC(prepare(problem, steps=10, kernel="torch"))
    first = mpc(0.0, [0.5])
    h = mpc.step
    kept = mpc(h, [2.5])
    assert torch.isfinite(first).all()
    assert torch.isfinite(kept).all()
    assert not bool(mpc.plan.converged)
    assert bool(torch.isfinite(mpc(2 * h, [0.4])).all())
    assert bool(mpc.plan.converged)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MPC(None), "got NoneType; expected a prepared problem"),
        (lambda: MPC(regulator(), every=0), "every is 0"),
        (lambda: MPC(regulator(), every=7), "reach beyond the plan's 6 steps"),
        (lambda: MPC(regulator(), delay=6), "reach beyond the plan's 6 steps"),
        (lambda: MPC(regulator(), update=3), "update is int"),
        (lambda: MPC(regulator())(0.0, [1.0]), r"a state of shape \(1,\); expected finite numbers of shape \(2,\)"),
        (lambda: MPC(regulator())(0.0, [1.0, float("nan")]), "expected finite numbers"),
        (lambda: MPC(regulator()).simulate([1.0, 0.0], 0), "steps is 0"),
        (lambda: MPC(regulator()).simulate([1.0, 0.0], 2, plant=lambda t, x, u: x[:1]), r"plant\(t, x, u\) returned"),
    ],
)
def test_misuse_is_named(make, message):
    with pytest.raises(ProblemError, match=message):
        make()


def test_time_that_runs_backwards_is_refused():
    mpc = MPC(regulator())
    mpc(5.0, [1.0, 0.0])
    with pytest.raises(ProblemError, match="expected time to run on"):
        mpc(4.0, [1.0, 0.0])
    mpc.reset()
    mpc(4.0, [1.0, 0.0])


def test_the_picture_is_drawn(tmp_path):
    MPC(regulator()).simulate([1.0, 0.0], 5).plot(tmp_path / "loop.png")
    assert (tmp_path / "loop.png").stat().st_size > 0


class TestStopping:
    def hard(self):
        """A pendulum that takes many iterations."""
        return OCP(
            lambda t, x, u: torch.stack([x[..., 1], torch.sin(x[..., 0]) + u[..., 0]], dim=-1),
            lambda t, x, u: 0.01 * (u**2).sum(-1),
            lambda t, x: 10 * ((x - torch.tensor([3.0, 0.0], dtype=F64)) ** 2).sum(-1),
            initial_state=[0.0, 0.0],
            control_dim=1,
            horizon=5.0,
            initial_guess={"controls": torch.full((20, 1), 0.1)},
        )

    def test_a_time_limit_returns_what_there_is(self):
        solution = prepare(self.hard(), steps=20, kernel="torch", time_limit=1e-6).solve()
        assert not bool(solution.converged)
        assert "the time limit was reached; raise time_limit" in solution.status
        assert bool(torch.isfinite(solution.cost))

    def test_ctrl_c_returns_what_there_is(self):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            calls = []

            def dynamics(t, x, u):
                calls.append(1)
                if len(calls) == 150:
                    signal.raise_signal(signal.SIGINT)
                return torch.stack([x[..., 1], torch.sin(x[..., 0]) + u[..., 0]], dim=-1)

            problem = self.hard()
            prepared = prepare(problem, steps=20, kernel="torch")
            object.__setattr__(problem, "dynamics", dynamics)
            solution = prepared.solve()
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            signal.signal(signal.SIGINT, before)
        assert not bool(solution.converged)
        assert "Ctrl-C was pressed" in solution.status

    @pytest.mark.parametrize("limit", [0.0, -1.0, float("inf")])
    def test_limits_that_are_none_are_refused(self, limit):
        with pytest.raises(ProblemError, match="time_limit of DDP"):
            prepare(self.hard(), steps=20, time_limit=limit)
