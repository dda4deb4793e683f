"""Local models against torch.func, one point at a time, on stages that are anything but convenient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import jacrev

from ocnopt import linearise
from ocnopt.linearise import derivatives, expand_path, expand_terminal
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.paths import Path, Widened, rollout
from ocnopt.staged import Stage, StagedOCP, transcribe
from tests.oracles.compare import assert_close

batches = st.lists(st.integers(1, 3), max_size=2).map(tuple)


def point_by_point(function, points):
    """Value, Jacobian and Hessian of ``function(index, w (d,)) -> (o,)`` at every point ``(*batch, d)``."""
    flat = points.reshape(-1, points.shape[-1])
    parts = []
    for make in (lambda f: f, jacrev, lambda f: jacrev(jacrev(f))):  # forward mode takes twice as long
        rows = [make(lambda w, i=i: function(i, w))(w) for i, w in enumerate(flat)]
        parts.append(torch.stack(rows).reshape((*points.shape[:-1], *rows[0].shape)))
    return parts


@given(batch=batches, d=st.integers(1, 4), o=st.integers(1, 3))
def test_derivatives_of_any_shape(batch, d, o):
    matrix, target = torch.rand(o, d).double(), torch.rand(*batch, o).double()
    points = torch.rand(*batch, d).double()

    def function(w):
        return torch.sin(w @ matrix.mT) * (w**2).sum(-1, keepdim=True) - target * w[..., :1] ** 3

    flat = target.reshape(-1, o)
    expected = point_by_point(
        lambda i, w: torch.sin(matrix @ w) * (w**2).sum(-1, keepdim=True) - flat[i] * w[..., :1] ** 3, points
    )
    for ours, right in zip(derivatives(function, points, o, hessian=True), expected, strict=True):
        assert_close(ours, right, rtol=1e-11, atol=1e-13)
    value, jacobian, nothing = derivatives(function, points, o, hessian=False)
    assert_close(value, expected[0], rtol=1e-12)
    assert_close(jacobian, expected[1], rtol=1e-11, atol=1e-13)
    assert nothing.numel() == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda w: torch.ones_like(w[..., :2]),
        lambda w: w[..., :2],
        lambda w: torch.stack([w[..., 0] ** 2, torch.zeros_like(w[..., 0])], dim=-1),
        lambda w: torch.stack([w[..., 1] * w[..., 2], w[..., 0]], dim=-1),
        lambda w: torch.stack([w[..., 0].detach(), w[..., 1] ** 3], dim=-1),
    ],
)
def test_functions_that_ignore_some_input(function):
    w = torch.rand(3, 3).double()
    expected = point_by_point(lambda i, w: function(w), w)
    for ours, right in zip(derivatives(function, w, 2, hessian=True), expected, strict=True):
        assert_close(ours, right, atol=1e-14)
    for ours, right in zip(derivatives(function, w, 2, hessian=False)[:2], expected, strict=False):
        assert_close(ours, right, atol=1e-14)


def test_nothing_holds_a_graph_and_nothing_of_the_callers_is_touched():
    w = torch.rand(3).double()
    with torch.no_grad():
        parts = derivatives(lambda w: (w**3).sum(-1, keepdim=True), w, 1, hessian=True)
    assert not any(part.requires_grad for part in parts)
    assert not w.requires_grad


def stage_with_data(data, weights):
    """k, the captured data of each sample, x and u all matter; the cost ignores one state."""
    return Stage(
        lambda k, x, u: torch.sin(x) * data + weights[k][..., None] * u.sum(-1, keepdim=True) * x.flip(-1),
        lambda k, x, u: (x[..., 0] - data[..., 0]) ** 4 * weights[k] + (u**2).sum(-1) * x[..., 0],
        control_dim=2,
    )


def models_of(problem, states, controls, *, second_order):
    """Models along a broken path, cut to the sizes of each step: (gap, fw, lw, lww, c -> c . f_ww)."""
    wide = Widened(problem)
    joined = states[0].shape[-1] == wide.n
    z = torch.stack(states) if joined else wide.join(states, problem.start_parameters())
    u = wide.join_controls(controls)
    models = expand_path(wide, Path(z, u, torch.zeros(z.shape[1:-1]), None), exact=second_order)
    for k, control in enumerate(controls):
        n, m, after = states[k].shape[-1], control.shape[-1], states[k + 1].shape[-1]
        w = [*range(n), *range(wide.n, wide.n + m)]
        block = (..., torch.tensor(w)[:, None], torch.tensor(w))
        yield (
            models.F[k][..., 1 : 1 + after, 0],
            models.F[k][..., 1 : 1 + after, 1:][..., w],
            models.L[k][..., 1:, 0][..., w],
            models.L[k][..., 1:, 1:][block],
            models.curvature and (lambda c, k=k, block=block: models.curvature[k].times(c)[block]),
        )


def step_by_step(stage_at, states, controls):
    """Derivatives of every step by torch.func; ``stage_at(k, i)``: dynamics and cost of sample i, of (x, u)."""
    for k, u in enumerate(controls):
        n = states[k].shape[-1]
        w = torch.cat([states[k], u], dim=-1)
        yield [
            point_by_point(lambda i, w, k=k, n=n, part=part: stage_at(k, i)[part](w[:n], w[n:]), w) for part in (0, 1)
        ]


def assert_models(problem, right, states, controls, *, second_order):
    """Compare every step's model with :func:`step_by_step`."""
    models = models_of(problem, states, controls, second_order=second_order)
    for k, ((gap, fw, lw, lww, curvature), (f, cost)) in enumerate(zip(models, right, strict=True)):
        assert_close(gap, f[0] - states[k + 1], rtol=1e-11, atol=1e-13)
        assert_close(fw, f[1], rtol=1e-11, atol=1e-13)
        assert_close(lw, cost[1], rtol=1e-11, atol=1e-13)
        assert_close(lww, cost[2], rtol=1e-11, atol=1e-13)
        if not second_order:
            assert curvature is None
            continue
        wide = Widened(problem)
        c = torch.randn(*states[k].shape[:-1], wide.n, dtype=torch.float64)
        expected = (c[..., : f[2].shape[-3], None, None] * f[2]).sum(-3)
        assert_close(curvature(c), expected, rtol=1e-11, atol=1e-13)


def infeasible_path(problem, controls):
    """States that nearly follow the dynamics: every gap is open."""
    path = rollout(
        problem, lambda k, x: controls[k], problem.initial_state, after=lambda k, x: x + 0.1 * torch.rand_like(x)
    )
    return list(path.states)


@pytest.fixture(scope="module", params=[(), (3,)], ids=["single", "batch"])
def one_stage(request):
    """A problem, a path that it does not follow, and the right derivatives along it."""
    torch.manual_seed(0)
    batch = request.param
    data, weights = torch.rand(*batch, 2).double(), torch.rand(5).double()
    problem = StagedOCP(stage_with_data(data, weights), initial_state=torch.rand(*batch, 2), steps=5)
    controls = list(torch.rand(5, *batch, 2).double())
    states = infeasible_path(problem, controls)
    flat = data.reshape(-1, 2)

    def stage_at(k, i):
        one = stage_with_data(flat[i], weights)
        return (lambda x, u: one.dynamics(torch.tensor(k), x, u)), (lambda x, u: one.cost(torch.tensor(k), x, u))

    return problem, [*step_by_step(stage_at, states, controls)], states, controls


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("points", [100_000, 40, 1])
@pytest.mark.parametrize("few", [0, 1_000])
def test_one_stage_for_all_steps(monkeypatch, one_stage, second_order, points, few):
    monkeypatch.setattr(linearise, "_POINTS", points)
    monkeypatch.setattr(linearise, "_FEW", few)
    assert_models(*one_stage, second_order=second_order)


@pytest.mark.parametrize("few", [0, 1_000])
@pytest.mark.parametrize("second_order", [True, False])
def test_stages_of_varying_size(monkeypatch, second_order, few):
    monkeypatch.setattr(linearise, "_FEW", few)
    wide = Stage(lambda k, x, u: torch.cat([x**2, u * x[..., :1]], dim=-1), lambda k, x, u: (k + 1) * x[..., 0] ** 3, 1)
    still = Stage(lambda k, x, u: torch.cos(x[..., 1:]), None, 0)
    problem = StagedOCP([wide, wide, still], initial_state=torch.rand(4, 1))
    controls = [torch.rand(4, m).double() for m in (1, 1, 0)]
    states = infeasible_path(problem, controls)

    def stage_at(k, i):
        stage = (wide, wide, still)[k]
        cost = stage.cost or (lambda k, x, u: 0 * x.sum(-1))
        return (lambda x, u: stage.dynamics(k, x, u)), (lambda x, u: cost(k, x, u))

    assert_models(problem, step_by_step(stage_at, states, controls), states, controls, second_order=second_order)


def test_static_controls_and_a_free_end_are_expanded_as_states():
    problem = OCP(
        lambda t, x, u, p: torch.sin(x) * p[..., :1] + u,
        lambda t, x, u, p: t * (x**2).sum(-1) + p[..., 1] ** 3,
        lambda t, x, p: t**2 * x[..., 0] * p[..., 0],
        initial_state=torch.rand(2, 2),
        control_dim=2,
        horizon=FreeHorizon(1.5, 1.0, 2.0),
        parameters=[0.7, 0.3],
    )
    staged = transcribe(problem, 3, "midpoint")
    wide = Widened(staged)
    p = staged.start_parameters() + torch.rand(2, 3).double() / 10
    controls = list(torch.rand(3, 2, 2).double())
    states = [torch.cat([x, p], dim=-1) for x in infeasible_path(staged, controls)]
    (group,) = staged.groups

    def stage_at(k, i):
        def next_state(z, u):
            return torch.cat([staged.advance(group.stage, k, z[:2], u, z[2:])[0], z[2:]])

        return next_state, lambda z, u: staged.advance(group.stage, k, z[:2], u, z[2:])[1]

    single = transcribe(
        OCP(
            problem.dynamics,
            problem.running_cost,
            problem.terminal_cost,
            initial_state=problem.initial_state[0],
            control_dim=2,
            horizon=problem.horizon,
            parameters=problem.parameters,
        ),
        3,
        "midpoint",
    )
    many, staged, (group,) = staged, single, single.groups
    assert_models(many, step_by_step(stage_at, states, controls), states, controls, second_order=True)
    assert_terminal(expand_terminal(wide, states[-1]), lambda i, z: z[4] ** 2 * z[0] * z[2], states[-1])


def assert_terminal(L, function, points):
    _, gradient, hessian = point_by_point(function, points)
    assert_close(L[..., 0, 0], torch.zeros_like(gradient[..., 0]))
    assert_close(L[..., 0, 1:], gradient, rtol=1e-11, atol=1e-13)
    assert_close(L[..., 1:, 0], gradient, rtol=1e-11, atol=1e-13)
    assert_close(L[..., 1:, 1:], hessian, rtol=1e-11, atol=1e-13)


def test_the_terminal_model_of_data_per_sample():
    target = torch.rand(2, 3, 2).double()
    flat = target.reshape(-1, 2)
    problem = StagedOCP(
        Stage(lambda k, x, u: x), lambda x: ((x - target) ** 4).sum(-1), initial_state=torch.rand(2, 3, 2), steps=1
    )
    x = problem.initial_state
    assert_terminal(expand_terminal(Widened(problem), x), lambda i, x: ((x - flat[i]) ** 4).sum(-1), x)


def test_without_a_terminal_cost_its_model_is_zero():
    problem = StagedOCP(Stage(lambda k, x, u: x), initial_state=torch.rand(3, 2), steps=1)
    assert_terminal(
        expand_terminal(Widened(problem), problem.initial_state), lambda i, x: 0 * x.sum(), problem.initial_state
    )


@given(batch=batches, n=st.integers(1, 3), m=st.integers(0, 2))
def test_homogeneous_coordinates_are_the_quadratic_model(batch, n, m):
    stage = Stage(
        lambda k, x, u: torch.sin(x) + u.sum(-1, keepdim=True), lambda k, x, u: (x**3).sum(-1) * (1 + (u**2).sum(-1)), m
    )
    problem = StagedOCP(stage, initial_state=torch.rand(*batch, n), steps=1)
    x, u = problem.initial_state, torch.rand(*batch, m).double()
    path = Path(torch.stack([x, torch.rand(*batch, n).double()]), u[None], torch.zeros(batch), None)
    models = expand_path(Widened(problem), path, exact=True)
    one, dx, du = torch.ones(*batch, 1).double(), torch.rand(*batch, n).double(), torch.rand(*batch, m).double()
    s = torch.cat([one, dx, du], dim=-1)
    moved = torch.sin(x) + torch.cos(x) * dx + (u + du).sum(-1, keepdim=True) - path.states[1]
    assert_close((models.F[0] @ s[..., None])[..., 0], torch.cat([one, moved], dim=-1))
    # the cost is a b with a = sum x^3, b = 1 + |u|^2; their derivatives along (dx, du)
    a, a1, a2 = (x**3).sum(-1), (3 * x**2 * dx).sum(-1), (6 * x * dx**2).sum(-1)
    b, b1, b2 = 1 + (u**2).sum(-1), (2 * u * du).sum(-1), (2 * du**2).sum(-1)
    change = a1 * b + a * b1 + 0.5 * (a2 * b + 2 * a1 * b1 + a * b2)
    assert_close(0.5 * (s * (models.L[0] @ s[..., None])[..., 0]).sum(-1), change)
