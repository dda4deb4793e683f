"""One step of the Bellman sweep, and whole sweeps on affine-quadratic problems, against dense linear algebra."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ocnopt.differential.sweep import BellmanStep, CostToGo, bellman_step, minimise_start, sweep
from ocnopt.linearise import Hessians, expand_path, expand_terminal
from ocnopt.paths import Widened, walk
from tests.oracles.compare import assert_close
from tests.oracles.lq import random_affine_quadratic


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def symmetric(*shape):
    root = draw(*shape)
    return root @ root.mT + torch.eye(shape[-1])


class Model(NamedTuple):
    """A step's model with all of f_ww, where it is curved."""

    F: torch.Tensor
    L: torch.Tensor
    fww: torch.Tensor | None

    @property
    def gap(self):
        return self.F[..., 1:, 0]

    @property
    def fw(self):
        return self.F[..., 1:, 1:]

    @property
    def lw(self):
        return self.L[..., 1:, 0]

    def step(self, damping, room=None):
        return BellmanStep(self.F, self.L, None if self.fww is None else Hessians(self.fww), room, damping)


def random_stage(batch, n, m, after, *, curved=False):
    """A model with a gap, and a value at its end."""
    d = n + m
    F = torch.zeros(*batch, 1 + after, 1 + d, dtype=torch.float64)
    F[..., 0, 0] = 1.0
    F[..., 1:, :] = draw(*batch, after, 1 + d)
    L = symmetric(*batch, 1 + d, 1 + d)
    L[..., 0, 0] = 0.0
    half = 0.05 * draw(*batch, after, d, d)
    V = symmetric(*batch, 1 + after, 1 + after)
    model = Model(F, L, half + half.mT if curved else None)
    return model, CostToGo(V, draw(*batch, 1 + after), torch.ones(batch, dtype=torch.bool))


def stage_cost(model, value, s, du):
    """Predicted change of cost-to-go at (1, dx) = s after du."""
    w = torch.cat([s, du], dim=-1)
    after = (model.F @ w[..., None])[..., 0]
    cost = 0.5 * (w * (model.L @ w[..., None])[..., 0]).sum(-1)
    cost = cost + 0.5 * (after * (value.V @ after[..., None])[..., 0]).sum(-1)
    if model.fww is not None:
        slope = value.V[..., 1:, 0] + (value.V[..., 1:, 1:] @ model.gap[..., None])[..., 0]
        curvature = (slope[..., None, None] * model.fww).sum(-3)
        cost = cost + 0.5 * (w[..., 1:] * (curvature @ w[..., 1:, None])[..., 0]).sum(-1)
    return cost


def homogeneous(dx):
    return torch.cat([torch.ones_like(dx[..., :1]), dx], dim=-1)


@given(
    batch=st.sampled_from([(), (3,), (2, 2)]),
    n=st.integers(1, 3),
    m=st.integers(0, 3),
    after=st.integers(1, 3),
    curved=st.booleans(),
)
def test_value_and_gains_minimise_the_model(batch, n, m, after, curved):
    model, value = random_stage(batch, n, m, after, curved=curved)
    before, gains = bellman_step(model.step(torch.zeros(m, m).double()), value)
    assert bool(before.solvable.all())
    s = homogeneous(draw(*batch, n))
    du = (gains.K @ s[..., None])[..., 0]
    best = stage_cost(model, value, s, du)
    assert_close(0.5 * (s * (before.V @ s[..., None])[..., 0]).sum(-1), best, rtol=1e-9, atol=1e-10)
    for _ in range(3):
        assert bool((stage_cost(model, value, s, du + 0.1 * draw(*batch, m)) >= best).all())
    assert_close(before.V, before.V.mT, rtol=1e-12, atol=1e-12)


@given(batch=st.sampled_from([(), (3,)]), m=st.integers(1, 3), bounded=st.booleans())
def test_the_value_of_damped_or_clamped_gains_is_the_cost_they_cause_and_the_damping(batch, m, bounded):
    model, value = random_stage(batch, 2, m, 2)
    room = (torch.full((m,), -0.1).double(), torch.full((m,), 0.2).double()) if bounded else None
    step = model.step(3.0 * torch.eye(m).double(), room)
    before, gains = bellman_step(step._replace(state_damping=torch.diag(torch.tensor([0.0, 2.0, 2.0]).double())), value)
    s = homogeneous(draw(*batch, 2))
    du = (gains.K @ s[..., None])[..., 0]
    caused = stage_cost(model, value, s, du) + 1.5 * du.square().sum(-1) + s[..., 1:].square().sum(-1)
    assert_close(0.5 * (s * (before.V @ s[..., None])[..., 0]).sum(-1), caused, rtol=1e-9, atol=1e-10)


def test_the_costate_is_the_plain_gradient_under_the_feedback():
    model, value = random_stage((), 2, 1, 3)
    before, gains = bellman_step(model.step(torch.zeros(1, 1).double()), value)
    slope = model.lw + model.fw.mT @ value.J[1:]
    feedback = gains.K[:, 1:]
    assert_close(gains.costate, slope[:2] + feedback.mT @ slope[2:])
    assert_close(before.J[1:], gains.costate)
    linear = value.linear + model.gap @ value.J[1:] + gains.K[:, 0] @ slope[2:]
    assert_close(before.linear, linear)


@pytest.mark.parametrize("m", [1, 2])
def test_a_stage_without_a_minimum_is_marked_for_its_problem_alone(m):
    model, value = random_stage((3,), 2, m, 2)
    L = model.L.clone()
    L[1, 3:, 3:] -= 1e3 * torch.eye(m)
    before, _ = bellman_step(model._replace(L=L).step(torch.zeros(m, m).double()), value)
    assert before.solvable.tolist() == [True, False, True]
    model, _ = random_stage((3,), 2, m, 2)
    again, _ = bellman_step(model.step(torch.zeros(m, m).double()), before)
    assert not bool(again.solvable[1])


def test_enough_damping_makes_any_stage_solvable():
    model, value = random_stage((3,), 2, 2, 2)
    L = model.L.clone()
    L[..., 3:, 3:] -= 1e3 * torch.eye(2)
    mu = torch.tensor([0.0, 1.0, 1e4]).double()
    before, _ = bellman_step(model._replace(L=L).step(mu[:, None, None] * torch.eye(2)), value)
    assert before.solvable.tolist() == [False, False, True]


def whole_sweep(lq, q):
    """Sweep over an affine-quadratic problem along an infeasible path; the path, its gaps and what comes out."""
    problem = lq.staged()
    wide = Widened(problem)
    first = torch.cat([problem.initial_state, draw(q)])
    controls = draw(lq.sizes[0], lq.sizes[2])
    gaps = torch.cat([draw(lq.sizes[0], lq.sizes[1]), torch.zeros(lq.sizes[0], q)], dim=-1)
    path = walk(wide, lambda k, x: controls[k], first, gaps)
    models = expand_path(wide, path, exact=True)
    terminal = expand_terminal(wide, path.states[-1])
    nothing = torch.zeros(lq.sizes[2], lq.sizes[2]).double()
    steps = [
        BellmanStep(F, L, models.curvature[k], None, nothing) for k, (F, L) in enumerate(zip(*models[:2], strict=True))
    ]
    end = CostToGo(terminal, terminal[0], torch.tensor(True))
    return wide, path, controls, gaps, sweep(bellman_step, steps, end)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 3), m=st.integers(1, 2))
def test_gains_and_value_are_those_of_the_riccati_recursion(seed, n, m):
    lq = random_affine_quadratic(seed, 6, n, m)
    _, _, _, _, (value, gains) = whole_sweep(lq, 0)
    K, P = lq.riccati()
    assert_close(torch.stack([gain.K[:, 1:] for gain in gains]), K, rtol=1e-8, atol=1e-10)
    assert_close(value.V[1:, 1:], P[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("q", [0, 2])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_predicted_change_of_cost_is_exact_for_every_step_size(q, alpha):
    lq = random_affine_quadratic(1, 6, 2, 2, q)
    wide, path, controls, gaps, (value, gains) = whole_sweep(lq, q)
    dp = torch.zeros(0).double()
    if q:
        dp, value = minimise_start(value, q, torch.zeros(q, q).double(), None)
    first = path.states[0] + torch.cat([torch.zeros(2).double(), alpha * dp])

    def law(k, x):
        return controls[k] + alpha * gains[k].K[:, 0] + gains[k].K[:, 1:] @ (x - path.states[k])

    moved = walk(wide, law, first, (1 - alpha) * gaps)
    predicted = alpha * value.linear + alpha**2 * value.quadratic
    assert_close(moved.cost - path.cost, predicted, rtol=1e-10)


def test_the_full_step_from_an_infeasible_path_is_the_solution():
    lq = random_affine_quadratic(2, 8, 3, 2, 2)
    wide, path, controls, _, (value, gains) = whole_sweep(lq, 2)
    dp, value = minimise_start(value, 2, torch.zeros(2, 2).double(), None)
    first = path.states[0] + torch.cat([torch.zeros(3).double(), dp])
    moved = walk(wide, lambda k, x: controls[k] + gains[k].K @ homogeneous(x - path.states[k]), first)
    states, best, parameters, cost = lq.solve()
    assert_close(moved.cost, cost, rtol=1e-10)
    assert_close(moved.controls, best, rtol=1e-8, atol=1e-9)
    assert_close(moved.states, np.concatenate([states, np.tile(parameters, (9, 1))], axis=1), rtol=1e-8, atol=1e-9)


def test_static_controls_stay_in_their_box():
    value = CostToGo(symmetric(4, 4), draw(4), torch.tensor(True))
    room = (torch.tensor([-0.01, -0.02]).double(), torch.tensor([0.01, 0.02]).double())
    dp, after = minimise_start(value, 2, torch.zeros(2, 2).double(), room)
    free, _ = minimise_start(value, 2, torch.zeros(2, 2).double(), None)
    assert bool((dp >= room[0]).all() & (dp <= room[1]).all())
    assert not torch.allclose(dp, free)
    s = torch.cat([torch.tensor([1.0, 0.0]).double(), dp])
    assert_close(0.5 * after.V[0, 0], 0.5 * s @ value.V @ s)
    assert_close(after.linear, value.linear + dp @ value.J[2:])


def test_a_value_without_a_minimum_over_the_static_controls_is_marked():
    V = torch.stack([symmetric(3, 3), -symmetric(3, 3)])
    value = CostToGo(V, draw(2, 3), torch.ones(2, dtype=torch.bool))
    assert minimise_start(value, 1, torch.zeros(1, 1).double(), None)[1].solvable.tolist() == [True, False]
