"""Walks on a grid and with error control, against closed forms and torchdiffeq."""

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ocnopt.errors import ConvergenceError, NonFiniteError, ProblemError
from ocnopt.integrate import adaptive, fixed, samples
from ocnopt.integrate.tableaus import DOPRI5, RK4, TABLEAUS, error_constant
from ocnopt.integrate.walk import StageLog

PAIRS = [tableau for tableau in TABLEAUS.values() if tableau.b_error is not None]


def pendulum(t, x):
    return torch.stack([x[..., 1], -torch.sin(x[..., 0]) + 0.1 * math.cos(float(t))], -1)


def start(*shape):
    return torch.linspace(-1.0, 1.0, math.prod(shape), dtype=torch.float64).reshape(shape)


@cache
def exact(times):
    from torchdiffeq import odeint

    return odeint(pendulum, start(3, 2), torch.tensor(times, dtype=torch.float64), rtol=1e-12, atol=1e-12)[1:]


@pytest.mark.parametrize("tableau", PAIRS, ids=lambda tableau: tableau.name)
@pytest.mark.parametrize("times", [(0.0, 2.0), (0.0, 0.3, 2.0), (2.0, 0.0), (2.0, 1.0, -1.0)])
def test_adaptive_agrees_with_a_tight_torchdiffeq_solve(tableau, times):
    pytest.importorskip("torchdiffeq")
    tolerance = 1e-7 if tableau.order > 2 else 1e-5
    walk = adaptive.integrate(pendulum, start(3, 2), times, tableau=tableau, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(torch.stack(walk.states), exact(times), rtol=0, atol=20 * tolerance)
    assert walk.state is walk.states[-1]


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_the_global_error_follows_the_tolerance(tolerance):
    x = torch.ones(4, dtype=torch.float64)
    walk = adaptive.integrate(lambda t, x: -x, x, (0.0, 3.0), rtol=tolerance, atol=tolerance)
    assert float(abs(walk.state - math.exp(-3.0)).max()) < 10 * tolerance


def test_evaluations_are_counted():
    calls = []

    def field(t, x):
        calls.append(t)
        return torch.sin(10 * x)

    walk = adaptive.integrate(field, start(5), (0.0, 1.0), rtol=1e-5, atol=1e-5)
    assert walk.evaluations == len(calls) == 2 + 6 * (walk.steps + walk.rejected)
    calls.clear()
    walk = adaptive.integrate(field, start(5), (0.0, 1.0), rtol=1e-5, atol=1e-5, first_size=0.9)
    assert walk.evaluations == len(calls) == 1 + 6 * (walk.steps + walk.rejected)
    assert walk.rejected > 0
    calls.clear()
    walk = fixed.integrate(field, start(5), (0.0, 1.0), step_size=0.1, tableau=DOPRI5)
    assert walk.evaluations == len(calls) == 1 + 6 * walk.steps


@pytest.mark.parametrize("walk", [adaptive, fixed])
def test_steps_join_and_end_at_the_outputs(walk):
    steps = []
    options = {"step_size": 0.3} if walk is fixed else {}
    times = (1.0, 0.25, -1.0)
    result = walk.integrate(pendulum, start(2), times, on_step=steps.append, **options)
    assert len(steps) == result.steps
    assert steps[0].time == 1.0
    for before, after in pairwise(steps):
        assert after.time == pytest.approx(before.time + before.size, abs=1e-12)
    ends = {step.output: step.time + step.size for step in steps if step.output is not None}
    assert ends == pytest.approx({1: 0.25, 2: -1.0})
    assert torch.equal(steps[0].stages.points[0], start(2))


def test_a_grid_is_cut_into_the_least_number_of_steps():
    walk = fixed.integrate(pendulum, start(2), (0.0, 0.5, 1.2), step_size=0.25)
    assert walk.steps == 2 + 3
    assert walk.evaluations == 4 * walk.steps


def test_first_slope_and_first_size_are_used():
    x = start(2)
    plain = adaptive.integrate(pendulum, x, (0.0, 1.0))
    given_slope = adaptive.integrate(pendulum, x, (0.0, 1.0), first=pendulum(0.0, x))
    assert torch.equal(plain.state, given_slope.state)
    assert given_slope.evaluations == plain.evaluations - 1
    sized = adaptive.integrate(pendulum, x, (0.0, 1.0), first=pendulum(0.0, x), first_size=0.5)
    assert sized.evaluations == 6 * (sized.steps + sized.rejected)


@pytest.mark.parametrize("tableau", PAIRS, ids=lambda tableau: tableau.name)
@pytest.mark.parametrize("rate", [-3.0, 0.5])
def test_the_first_step_of_a_linear_field_is_as_long_as_the_tolerance_allows(tableau, rate):
    x, steps, atol = torch.ones(4, dtype=torch.float64), [], 1e-4 if tableau.order == 2 else 1e-10
    options = {"tableau": tableau, "rtol": 0.0, "atol": atol, "on_step": steps.append}
    walk = adaptive.integrate(lambda t, x: rate * x, x, (0.0, 2.0), **options)
    estimate = error_constant(tableau) * abs(rate * steps[0].size) ** tableau.order
    assert estimate == pytest.approx(0.9**tableau.order * atol, rel=1e-3)
    assert walk.rejected == 0


def test_units_of_time_do_not_matter():
    def walk(unit, span):
        return adaptive.integrate(lambda t, x: unit * torch.sin(x), start(5), (0.0, span), rtol=1e-6, atol=1e-6)

    one, other = walk(1.0, 4.0), walk(0.001, 4000.0)
    assert (one.steps, one.rejected) == (other.steps, other.rejected)
    torch.testing.assert_close(one.state, other.state)


@pytest.mark.parametrize("end", [30.0, -30.0])
def test_a_path_that_starts_at_rest_begins_no_shorter_than_by_hairers_rule(end):
    steps = []
    walk = adaptive.integrate(
        lambda t, x: torch.sin(torch.tensor(t, dtype=x.dtype)).expand_as(x),
        torch.zeros(3, dtype=torch.float64),
        (0.0, end),
        on_step=steps.append,
    )
    assert abs(steps[0].size) > 0.197  # 0.198 by that rule
    torch.testing.assert_close(walk.state, torch.full((3,), 1 - math.cos(30.0), dtype=torch.float64), rtol=0, atol=0.02)


def test_samples_alone_begin_as_one_sample_does():
    def field(t, x):
        return -x

    begun, steps = [], []
    states, times = start(4, 1), torch.tensor([0.0, 2.0], dtype=torch.float64)[:, None].expand(2, 4)
    samples.integrate(field, states, times, tableau=DOPRI5, rtol=1e-6, atol=1e-6, on_step=begun.append)
    for i, state in enumerate(states):
        steps.clear()
        adaptive.integrate(field, state, (0.0, 2.0), rtol=1e-6, atol=1e-6, on_step=steps.append)
        assert float(begun[0].sizes[i]) == pytest.approx(steps[0].size, rel=1e-12)


def test_slope_at_the_end_is_that_of_the_last_stage():
    walk = adaptive.integrate(pendulum, start(2), (0.0, 1.0))
    torch.testing.assert_close(walk.slope, pendulum(1.0, walk.state))
    assert fixed.integrate(pendulum, start(2), (0.0, 1.0), step_size=0.1).slope is None


def test_a_norm_may_leave_entries_out_of_step_control():
    def field(t, x):
        return torch.stack([-x[0], 30 * torch.cos(30 * x[0])])

    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    whole = adaptive.integrate(field, x, (0.0, 1.0), rtol=1e-6, atol=1e-6)
    half = adaptive.integrate(field, x, (0.0, 1.0), rtol=1e-6, atol=1e-6, norm=lambda ratio: ratio[0].abs())
    assert half.steps < whole.steps
    assert float(half.state[0]) == pytest.approx(math.exp(-1.0), abs=1e-5)


def test_a_graph_is_continued_through_accepted_steps():
    rate = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    walk = adaptive.integrate(lambda t, x: rate * x, x, (0.0, 1.0), rtol=1e-9, atol=1e-9)
    walk.state.sum().backward()
    assert float(x.grad) == pytest.approx(math.exp(-1.0), rel=1e-8)
    assert float(rate.grad) == pytest.approx(math.exp(-1.0), rel=1e-8)


def test_a_step_that_leaves_the_domain_is_tried_again():
    # The square root is NaN beyond t = 1, where the path ends.
    def field(t, x):
        return -torch.sqrt(torch.tensor(1.0 - float(t), dtype=torch.float64)).expand_as(x)

    x = torch.ones(1, dtype=torch.float64)
    walk = adaptive.integrate(field, x, (0.0, 0.999), first_size=5.0, rtol=1e-6, atol=1e-6)
    assert float(walk.state) == pytest.approx(1 - 2 / 3 * (1 - 0.001**1.5), abs=1e-5)


@given(
    shape=st.lists(st.integers(1, 3), min_size=0, max_size=4),
    end=st.floats(-2.0, 2.0).filter(lambda end: abs(end) > 1e-3),
    name=st.sampled_from(sorted(TABLEAUS)),
)
def test_any_shape_and_direction(shape, end, name):
    x = torch.ones(shape, dtype=torch.float64)
    walk = fixed.integrate(lambda t, x: x, x, (0.0, end), step_size=0.01, tableau=TABLEAUS[name])
    assert walk.state.shape == x.shape
    torch.testing.assert_close(walk.state, x * math.exp(end), rtol=3e-2 if name == "euler" else 1e-4, atol=0)


@given(split=st.floats(0.05, 0.95))
def test_an_output_on_the_way_changes_nothing_beyond_the_tolerance(split):
    x = start(2)
    whole = adaptive.integrate(pendulum, x, (0.0, 1.0), rtol=1e-8, atol=1e-8).state
    parted = adaptive.integrate(pendulum, x, (0.0, split, 1.0), rtol=1e-8, atol=1e-8).state
    torch.testing.assert_close(parted, whole, rtol=0, atol=1e-7)


def test_nothing_moves():
    x = torch.zeros(3, dtype=torch.float64)
    walk = adaptive.integrate(lambda t, x: torch.zeros_like(x), x, (0.0, 1.0))
    assert torch.equal(walk.state, x)
    assert walk.steps == 1


def test_a_state_at_zero_starts_quickly():
    walk = adaptive.integrate(lambda t, x: 1.0 - x, torch.zeros(3, dtype=torch.float64), (0.0, 1.0))
    assert walk.steps <= 4
    torch.testing.assert_close(walk.state, torch.full_like(walk.state, 1 - math.exp(-1.0)), rtol=0, atol=1e-3)


def test_a_probe_beyond_the_domain_shortens_the_first_step():
    # Nothing moves at the start, so the search for a first step looks at the end, where the field is NaN.
    def field(t, x):
        return torch.full_like(x, math.nan if t > 0.6 else 10.0 * t)

    walk = adaptive.integrate(field, torch.zeros(2, dtype=torch.float64), (0.0, 0.5))
    torch.testing.assert_close(walk.state, torch.full_like(walk.state, 1.25), rtol=1e-6, atol=0)
    walk = adaptive.integrate(field, torch.zeros(2, dtype=torch.float64), (0.0, 0.5, 0.55))
    assert walk.rejected == 0
    with pytest.raises(NonFiniteError, match="near t = 0.6"):
        adaptive.integrate(field, torch.zeros(2, dtype=torch.float64), (0.0, 1.0))


def test_times_must_run_in_one_direction():
    for times in [(0.0,), (0.0, 0.0), (0.0, 1.0, 0.5), (0.0, math.inf)]:
        with pytest.raises(ProblemError, match="do not run in one direction; expected a start"):
            adaptive.integrate(pendulum, start(2), times)


def test_tolerances_must_make_sense():
    with pytest.raises(ProblemError, match="expected two finite tolerances >= 0, not both zero"):
        adaptive.integrate(pendulum, start(2), (0.0, 1.0), rtol=0.0, atol=0.0)


def test_step_control_needs_an_error_estimate():
    with pytest.raises(ProblemError, match="'rk4' has no error estimate; expected one of .*tsit5, dopri8, or"):
        adaptive.integrate(pendulum, start(2), (0.0, 1.0), tableau=RK4)


def test_step_size_must_be_positive():
    with pytest.raises(ProblemError, match="step_size is 0.0; expected a positive length"):
        fixed.integrate(pendulum, start(2), (0.0, 1.0), step_size=0.0)


def test_a_field_that_is_nan_at_the_start_is_named():
    with pytest.raises(NonFiniteError, match="NaN or infinity near t = 0 at the very start; expected finite values"):
        adaptive.integrate(lambda t, x: x * math.nan, start(2), (0.0, 1.0))


def test_a_field_that_turns_nan_is_named_with_its_time():
    def field(t, x):
        return x / 0.0 if t > 0.5 else x

    with pytest.raises(NonFiniteError, match=r"near t = 0\.[45].* for steps down to .*; expected finite values"):
        adaptive.integrate(field, torch.ones(2, dtype=torch.float64), (0.0, 1.0))


def test_an_explosion_on_a_grid_is_named_with_its_interval():
    with pytest.raises(NonFiniteError, match=r"between t = 0 and t = 2, in steps of 0.01; expected a finite path"):
        fixed.integrate(lambda t, x: x**3, torch.ones(2, dtype=torch.float64), (0.0, 2.0), step_size=0.01)


def test_finite_states_may_have_a_sum_that_is_not():
    x = torch.full((4,), 1e308, dtype=torch.float64)
    assert torch.equal(fixed.integrate(lambda t, x: 0 * x, x, (0.0, 1.0), step_size=0.5).state, x)


def test_underflow_names_time_step_and_causes():
    with pytest.raises(ConvergenceError, match=r"underflow in dt: at t = 0\.99.*expected a smooth field"):
        adaptive.integrate(lambda t, x: x**2, torch.ones(2, dtype=torch.float64), (0.0, 2.0), max_evaluations=10**5)


def test_the_cap_on_evaluations_names_time_and_causes():
    with pytest.raises(ConvergenceError, match=r"more than its 50 evaluations.*stands at t = 0\..*grown stiff"):
        adaptive.integrate(lambda t, x: 1e3 * torch.sin(x), start(9), (0.0, 1.0), max_evaluations=50)


@pytest.mark.parametrize("tableau", [*PAIRS, RK4], ids=lambda tableau: tableau.name)
def test_a_stage_log_keeps_what_belongs_to_accepted_steps(tableau):
    """Note the number of each evaluation; the times of the stages say which ones a step used."""
    log, seen, steps = StageLog(tableau), [], []

    def field(t, x):
        log.add(len(seen))
        seen.append(t)
        # A kick that no first step length foresees.
        return torch.sin(20 * x) + (40.0 if 0.3 < t < 0.4 else 0.0)

    def accept(step):
        steps.append((step, log.accept()))

    if tableau is RK4:
        walk = fixed.integrate(field, start(4), (0.0, 1.0), step_size=0.2, on_step=accept)
    else:
        walk = adaptive.integrate(field, start(4), (0.0, 1.0), tableau=tableau, rtol=1e-4, atol=1e-4, on_step=accept)
        assert walk.rejected > 0
    for step, notes in steps:
        assert len(notes) == len(tableau.c)
        assert [seen[note] for note in notes] == pytest.approx(step.stages.times, abs=1e-14)
