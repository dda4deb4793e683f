"""Output times as users give them, their gradients, and the horizon as it is set."""

import copy
import math

import pytest
import torch

from ocnopt.errors import ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon, Horizon
from ocnopt.optim.horizon_policy import HorizonPolicy
from tests.neural.cases import Plain, Tanh, start


@pytest.mark.parametrize("method", ["heun2", "heun3", "explicit_adams"])
def test_times_on_a_grid_of_torchdiffeq_are_refused_where_they_need_gradients(method):
    pytest.importorskip("torchdiffeq")
    x, times = torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 0.25, 0.73], dtype=torch.float64)
    ode = NeuralODE(lambda t, x: 0.7 * x + t, method=method, steps=100)
    with pytest.raises(ProblemError, match=f"times that need gradients met method='{method}'.*on a fixed grid"):
        ode(x, times.clone().requires_grad_())
    ode(x, times)
    end = times[1:].clone().requires_grad_()
    (found,) = torch.autograd.grad(ode(x, torch.cat([times[:1], end[1:]])).sum(), end)
    expected = 0.7 * ode(x, times)[-1] + times[-1]
    torch.testing.assert_close(
        found[1:], expected, rtol=1e-2, atol=0
    )  # the last step of explicit_adams is of low order


def test_a_first_time_that_is_the_start_moves_the_start():
    x, delay = torch.ones(1, dtype=torch.float64), 1e-5
    tight = {"rtol": 1e-11, "atol": 1e-11}
    times = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)

    def field(t, x):
        return 0.7 * x + t

    (found,) = torch.autograd.grad(NeuralODE(field, **tight)(x, times).sum(), times)
    ends = [NeuralODE(field, Horizon(t0, 1.0), **tight)(x, [t0, 0.5, 1.0]).sum() for t0 in (-delay, delay)]
    torch.testing.assert_close(found[0], (ends[1] - ends[0]) / (2 * delay), rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{}, {"adjoint": "continuous"}, {"error_norm": "sample"}])
def test_times_in_a_list_keep_their_gradients(options):
    field, x = Tanh(), start(4, 3)
    ode = NeuralODE(field, rtol=1e-8, atol=1e-8, **options)
    T, middle = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.8, 0.5))
    outputs = ode(x, [0.2, middle, T])
    found = torch.autograd.grad(outputs.sum(), (middle, T))
    # dx/dt at each of them, by the field itself
    expected = [
        field(time.detach(), output.detach()).sum() for time, output in zip((middle, T), outputs[1:], strict=True)
    ]
    torch.testing.assert_close(found, tuple(expected), rtol=1e-5, atol=0)
    single = T.detach().float().requires_grad_()
    assert torch.autograd.grad(ode(x, (0.2, single))[-1].sum(), single)[0].dtype == torch.float32


def test_ends_of_samples_in_a_list_keep_their_gradients():
    field, x = Tanh(), start(2, 3)
    ends = torch.tensor([0.4, 0.8], dtype=torch.float64, requires_grad=True)
    output = NeuralODE(field, rtol=1e-9, atol=1e-9, error_norm="sample")(x, [ends / 2, ends])[-1]
    (found,) = torch.autograd.grad(output.sum(), ends)
    torch.testing.assert_close(found, field(ends.detach()[:, None], output.detach()).sum(1), rtol=1e-6, atol=0)


def test_whole_numbers_are_times():
    x, ode = start(4, 3), NeuralODE(Tanh(), 2.0)
    assert torch.equal(ode(x, torch.tensor([0, 1, 2])), ode(x, [0.0, 1.0, 2.0]))
    assert torch.equal(ode(x, [0, torch.tensor(1), 2]), ode(x, [0.0, 1.0, 2.0]))


@pytest.mark.parametrize(
    "times", [[0.2, torch.ones(2)], [torch.ones(2), torch.ones(3)], [[0.2], [torch.ones(()), 0.5]]]
)
@pytest.mark.parametrize("error_norm", ["batch", "sample"])
def test_tensors_in_a_list_that_do_not_fit_are_refused(times, error_norm):
    with pytest.raises(ProblemError, match=r"times is a list of tensors that do not fit together .*torch.stack"):
        NeuralODE(Tanh(), error_norm=error_norm)(start(2, 3), times)


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.0999, 2.001, float("nan")])
def test_an_end_out_of_its_bounds_is_refused(value):
    ode = NeuralODE(Tanh(), FreeHorizon(1.0, 0.1, 2.0))
    other = NeuralODE(Tanh(), FreeHorizon(1.0, 0.1, 2.0))
    with torch.no_grad():
        ode.T.fill_(value)
    other.load_state_dict(ode.state_dict())
    for each in (ode, other):
        for call in (each, lambda x, each=each: each.until(lambda t, x: t - 0.5, x)):
            with pytest.raises(ProblemError, match=r"T is .*, out of the bounds of FreeHorizon\(.*from 0.1 to 2"):
                call(start(4, 3))


@pytest.mark.parametrize("bound", [0.1, 0.7])
def test_a_bound_that_single_precision_rounds_outwards_is_none_passed(bound):
    ode = NeuralODE(lambda t, x: -x, FreeHorizon(bound, bound, bound + 1e-9))
    ode.T = torch.tensor(bound, dtype=torch.float32)
    assert ode(torch.ones(1, 3)).isfinite().all()


def test_a_horizon_that_is_set_later():
    field, x = Tanh(), start(4, 3)
    ode = NeuralODE(field, 1.0)
    ode.horizon = 2
    assert ode.horizon == Horizon(0.0, 2.0)
    assert torch.equal(ode(x), NeuralODE(field, 2.0)(x))
    ode.horizon = FreeHorizon(0.5, 0.1, 2.0)
    assert "T" in ode.state_dict()
    assert torch.equal(ode(x), NeuralODE(field, 0.5)(x))
    assert torch.equal(copy.deepcopy(ode)(x), ode(x))
    T = ode.T
    ode.horizon = FreeHorizon(1.5, 1.0, 4.0)
    assert ode.T is T
    assert torch.equal(ode(x), NeuralODE(field, 1.5)(x))
    ode.horizon = 0.5
    assert "T" not in ode.state_dict()
    assert torch.equal(ode(x), NeuralODE(field, 0.5)(x))
    with pytest.raises(ProblemError, match="horizon is 'late'"):
        ode.horizon = "late"
    assert ode.horizon == Horizon(0.0, 0.5)


def test_a_policy_goes_by_the_bounds_that_are_set_later():
    torch.manual_seed(0)
    ode = NeuralODE(Tanh(), FreeHorizon(1.0, 0.1, 2.0))
    policy = HorizonPolicy(ode, lr=1.0, rule="adjoint", penalty=100.0, every=1)
    ode.horizon = FreeHorizon(1.0, 0.9, 2.0)
    ode(start(8, 3)).square().mean().backward()
    policy.step()
    assert float(ode.T) == 0.9


def test_autograd_follows_what_a_function_captures():
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"method": "rk4"}, {"error_norm": "sample"}):
        y = NeuralODE(lambda t, x: -a * x, adjoint="backprop", rtol=1e-8, atol=1e-8, **options)(
            torch.ones(4, 3).double()
        )
        (found,) = torch.autograd.grad(y.sum(), a)
        torch.testing.assert_close(found, -y.detach().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("error_norm", ["batch", "sample"])
@pytest.mark.parametrize(
    ("horizon", "times"),
    [((0.0, 1.0), [0.0, -0.5, -1.0]), ((0.0, 1.0), [-0.5, -1.0]), ((1.0, 0.0), [1.0, 2.0])],
)
def test_a_path_that_turns_back_before_its_first_time_is_refused(horizon, times, error_norm):
    ode, x = NeuralODE(Tanh(), Horizon(*horizon), error_norm=error_norm), start(2, 3)
    away = rf"lead from {times[0]} to {times[-1]}, away from the horizon, {horizon[0]} to {horizon[1]}"
    with pytest.raises(ProblemError, match=rf"{away}: .*horizon=oc\.Horizon\({times[0]}, {times[-1]}\) if x is"):
        ode(x, times)
    within = [0.5 * sum(horizon), *times]  # from the horizon's end through all of it
    torch.testing.assert_close(
        ode(x, within)[1:], NeuralODE(ode.field, Horizon(horizon[1], times[-1]))(x, times), rtol=1e-3, atol=1e-4
    )


def test_samples_that_end_where_the_horizon_starts_go_against_it():
    ode, x = NeuralODE(Tanh(), error_norm="sample", rtol=1e-8, atol=1e-8), start(2, 3)
    found = ode(x, torch.tensor([[0.4, 0.0], [0.2, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(found[1, 1], NeuralODE(ode.field, Horizon(1.0, 0.0))(x)[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
@pytest.mark.parametrize("method", ["dopri5", "rk4", "kvaerno5"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_the_field_is_called_with_a_0d_time_also_where_times_need_gradients(adjoint, method, dense, shape):
    if method == "kvaerno5" and adjoint == "continuous":
        return
    called = []

    def field(t, x):
        called.append((t.shape, x.shape))
        return torch.cos(t) * x

    ode = NeuralODE(Plain(field), method=method, adjoint=adjoint, dense=dense, rtol=1e-9, atol=1e-9)
    times = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64, requires_grad=True)
    end = ode(torch.ones(shape, dtype=torch.float64), times)[-1]
    end.sum().backward()
    assert {*called} == {((), shape)}
    slope = float((torch.cos(times.detach()[-1]) * end.detach()).sum())
    assert float(times.grad[-1]) == pytest.approx(slope, rel=1e-5)
    assert float(times.grad[0]) == pytest.approx(0.0, abs=1e-5)  # an output on the way


@pytest.mark.parametrize("error_norm", ["batch", "sample"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_times_that_are_no_finite_numbers_are_named(error_norm, bad):
    ode = NeuralODE(Tanh(), error_norm=error_norm)
    for times in ([0.0, bad, 1.0], torch.tensor([0.0, bad, 1.0]), [torch.tensor(0.0), torch.tensor(bad)]):
        with pytest.raises(ProblemError, match=r"times holds NaN or infinity at \(1,\); expected finite numbers"):
            ode(start(2, 3), times)
