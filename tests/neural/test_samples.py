"""Step sizes, errors and times of each sample by itself."""

import pytest
import torch
from torch import nn

from ocnopt.errors import ConvergenceError, NonFiniteError, OcnoptError, ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon, Horizon
from tests.neural.cases import Plain, Tanh, distance, gradients, loss, start

METHODS = ["dopri5", "bosh3", "dopri8"]


def spread():
    """Samples that need steps of very different lengths."""
    return start(4, 3) * torch.tensor([0.1, 1.0, 5.0, 20.0], dtype=torch.float64)[:, None]


def made(field=None, horizon=1.0, **options):
    return NeuralODE(Fast() if field is None else field, horizon, **{"error_norm": "sample", **options})


class Fast(Tanh):
    """Rejects steps: a short push on the way, and the larger a state, the faster it moves."""

    def forward(self, t, x):
        return super().forward(t, x) - 0.1 * x * x.abs() + 4 * torch.exp(-(((t - 0.15) / 0.04) ** 2)) * x


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_samples_solved_alone(method):
    ode, x = made(method=method), spread()
    ends = torch.tensor([0.2, 0.6, 0.4, 0.8], dtype=torch.float64)
    states, steps, rejected = ode(x, ends[None])[0], ode.statistics.steps, ode.statistics.rejected
    assert len(set(steps.tolist())) > 2
    assert rejected.any()
    for i, end in enumerate(ends.tolist()):
        for error_norm in ("sample", "batch"):
            alone = NeuralODE(ode.field, end, method=method, error_norm=error_norm)
            torch.testing.assert_close(alone(x[i : i + 1])[0], states[i], rtol=1e-12, atol=1e-13)
            assert int(alone.statistics.steps) == steps[i]
            assert int(alone.statistics.rejected) == rejected[i]


@pytest.mark.parametrize("budget", [256 * 2**20, 300])
@pytest.mark.parametrize(("method", "rtol"), [("dopri5", 1e-5), ("bosh3", 1e-3)])
def test_discrete_gradients_are_those_of_back_propagation(method, rtol, budget):
    field, x = Fast(), spread()
    times = torch.tensor([[0.0, 0.2, 0.1, 0.3], [0.3, 0.2, 0.5, 0.6]], dtype=torch.float64)
    ours, plain = (
        made(field, method=method, rtol=rtol, adjoint=a, checkpoint_bytes=budget) for a in ("discrete", "backprop")
    )
    (y, found), (z, right) = gradients(ours, x, times), gradients(plain, x, times)
    assert int(ours.statistics.rejected.sum()) > 0
    torch.testing.assert_close(y, z, rtol=1e-13, atol=1e-13)
    assert distance(found, right) < 1e-11
    alone = [
        gradients(made(field, method=method, rtol=rtol), x[i : i + 1], times[:, i : i + 1])[1] for i in range(len(x))
    ]
    assert distance(torch.stack([g[3:] for g in alone]).sum(0), right[12:]) < 1e-10
    assert distance(torch.cat([g[:3] for g in alone]), right[:12]) < 1e-10


def test_a_rejected_attempt_that_left_the_domain_does_not_reach_the_gradient():
    field = Plain(lambda t, x: -x / (x.sqrt() * 0.01 + 1e-3) * torch.ones(()).double())
    x = torch.tensor([[1e-4], [4.0], [90.0]], dtype=torch.float64)
    found = [gradients(made(field, adjoint=adjoint, horizon=0.02), x) for adjoint in ("discrete", "backprop")]
    assert found[0][1].isfinite().all()
    assert distance(found[0][1], found[1][1]) < 1e-11


def test_gradients_of_times_for_each_sample():
    ode, x = made(Tanh(), rtol=1e-9, atol=1e-9, method="dopri8"), start(3, 3)
    times = torch.tensor([[0.2, 0.0, 0.1], [0.7, 0.5, 0.1], [0.7, 1.3, 0.4]], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(ode(x, times)), times)
    # The equal ones move together, others alone.
    for moved in ([(0, 0)], [(1, 0), (2, 0)], [(1, 1)], [(2, 2)]):
        eps = torch.zeros_like(times).detach()
        for place in moved:
            eps[place] = 1e-5
        plus, minus = (loss(ode(x, times.detach() + sign * eps)).detach() for sign in (1, -1))
        right = sum(float(found[place]) for place in moved)
        assert float((plus - minus) / 2e-5) == pytest.approx(right, rel=1e-6, abs=1e-8)


def test_gradient_of_a_free_end_time_and_common_times():
    x, field = start(4, 3), Tanh()
    found = []
    for error_norm in ("sample", "batch"):
        ode = NeuralODE(field, FreeHorizon(0.8, 0.1, 2.0), error_norm=error_norm, rtol=1e-6, atol=1e-6)
        ode.T.requires_grad_()
        common = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
        found.append([*torch.autograd.grad(loss(ode(x)), ode.T), *torch.autograd.grad(loss(ode(x, common)), common)])
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def test_times_that_run_against_the_horizon_and_none_at_all():
    field, x = Tanh(), start(2, 3)
    back = torch.tensor([[0.9, 0.8], [0.1, 0.3]], dtype=torch.float64)
    turned = made(field, Horizon(1.0, 0.0))(x, back)
    torch.testing.assert_close(made(field)(x, back), turned)
    torch.testing.assert_close(made(field)(x, [0.4, 1.0])[-1], made(field)(x), rtol=1e-3, atol=1e-3)
    assert made(field)(x[:0]).shape == (0, 3)
    empty = x[:0].requires_grad_()
    made(field)(empty).sum().backward()
    assert empty.grad.shape == (0, 3)


class Pair(nn.Module):
    """A tuple state whose parts have different axes."""

    def __init__(self):
        super().__init__()
        self.net = Tanh(2)

    def forward(self, t, state):
        x, _ = state
        dx = self.net(t, x)
        return dx, (dx * x).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tuples_and_precision(dtype):
    field, state = Pair().to(dtype), (start(3, 2).to(dtype), start(3).to(dtype))
    ode = made(field)
    x, total = ode(state, torch.tensor([[0.5, 0.2, 1.0]]))
    assert (x.shape, total.shape, x.dtype) == ((1, 3, 2), (1, 3), dtype)
    (found, right) = (gradients(made(field, adjoint=a), state)[1] for a in ("discrete", "backprop"))
    assert distance(found, right) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_statistics_and_observers():
    ode, x = made(), spread()
    ode(x).sum().backward()
    s = ode.statistics
    assert s.steps.shape == s.rejected.shape == (4,)
    assert s.forward >= 2 + 6 * int(s.steps.max())
    assert s.backward >= 6 * int(s.steps.max())
    with torch.no_grad():
        ode(x)
    assert torch.equal(ode.statistics.steps, s.steps)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"error_norm": "each"}, "error_norm"),
        ({"method": "rk4"}, "expected error control, .* one of"),
        ({"steps": 4}, "expected error control"),
        ({"adjoint": "continuous"}, 'one integral over one time of all samples; expected adjoint="discrete"'),
        ({"dense": True}, "expected dense=False"),
    ],
)
def test_options_that_do_not_go_together(options, match):
    with pytest.raises(ProblemError, match=match):
        made(**options)


@pytest.mark.parametrize(
    ("times", "match"),
    [
        (torch.tensor([0.2, 0.5]), r"times\[None, :\] for ends of their own, times\[:, None\] for common times"),
        (torch.tensor([[0.2, 0.5], [0.3, 0.4]]), "times of sample 1, .* do not lead on"),
        (torch.tensor([[-0.2, 0.5]]), "times of sample 0, .* do not lead on"),
        (torch.ones(2, 3), r"times has shape \(2, 3\)"),
        (torch.ones(2, 2, dtype=torch.bool), "floating-point"),
        ([0.5, 0.2, 0.9], "do not lead on"),
        ([0.5, float("nan")], "NaN"),
    ],
)
def test_times_that_make_no_sense(times, match):
    with pytest.raises(ProblemError, match=match):
        made(Tanh())(start(2, 3), times)
    if isinstance(times, torch.Tensor) and times.ndim > 1:
        with pytest.raises(ProblemError, match="need error_norm|floating-point"):
            NeuralODE(Tanh())(start(2, 3), times)


@pytest.mark.parametrize(
    ("field", "shape", "match"),
    [
        (lambda t, x: x * float(t), (2, 3), r"times of shape \(2, 1\), one for each sample, and failed"),
        (lambda t, x: x + t.reshape(1), (2, 3), "and failed"),
        (lambda t, x: torch.stack([x[:, 0] * t[:, 0], x[:, 1] * t], 1), (2, 2), "failed"),
        (lambda t, x: x - x.mean(0), (2, 3), "in which samples meet"),
        (lambda t, x: x * t.mean(), (2, 3), "in which samples meet"),
        (lambda t, x: torch.tanh(x.roll(2, 0)), (6, 3), "in which samples meet"),
        (lambda t, x: x - x[[0]], (5, 3), "in which samples meet"),
        (lambda t, x: x - x[[4]], (5, 3), "in which samples meet"),
        (lambda t, x: x - x.view(2, 4, 3).mean(0).repeat(2, 1), (8, 3), "in which samples meet"),
        (lambda t, x: torch.tanh(x * x.roll(1)), (4,), r"samples meet.* x\[None\] for a state without samples"),
        (lambda t, x: x * torch.rand(1).double(), (2, 3), "draws random numbers"),
        (lambda t, x: torch.sin(5 * x) * torch.cos(4 * t).squeeze(), (4, 4), "in which samples meet"),
        (lambda t, x: torch.sin(5 * x) * (t * t).squeeze(), (4, 4), "in which samples meet"),
        (lambda t, x: torch.sin(5 * x) * torch.relu(t - 0.3).squeeze(), (4, 4), "in which samples meet"),
        (lambda t, x: torch.sin(5 * x) * (t > 0.5).squeeze(), (4, 4), "in which samples meet"),
        (lambda t, x: x - (x.sum(0) > 0) * torch.ones_like(x), (4, 3), "in which samples meet"),
    ],
)
def test_fields_that_cannot_have_a_time_for_each_sample(field, shape, match):
    ode = made(Plain(field))
    with pytest.raises(ProblemError, match=match):
        ode(start(*shape))
    with pytest.raises(ProblemError, match=match), torch.no_grad():
        ode(start(*shape))


def test_a_tuple_whose_times_meet_another_axis():
    """The one time of the field has the axes of a state (B, 1), not those of each part."""
    ode = made(Plain(lambda t, s: (torch.sin(5 * s[0]) * torch.cos(4 * t), -s[1])))
    with pytest.raises(ProblemError, match="in which samples meet"):
        ode((start(4, 4, 3), start(4, 1)))


def test_a_field_that_begins_to_couple_samples_is_looked_at_again():
    inner, outer = nn.Linear(3, 6).double(), nn.Linear(6, 3).double()
    for p in outer.parameters():
        nn.init.zeros_(p)
    calls = []

    def coupled(t, x):
        calls.append(1)
        h = inner(x)
        return outer(torch.tanh(h - h.mean(0))) * torch.ones_like(t)

    ode, x, costs = made(Plain(coupled)), start(4, 3), []
    ode.field.layers = nn.ModuleList([inner, outer])
    for _ in range(7):
        calls.clear()
        ode(x)
        costs.append(len(calls) - ode.statistics.forward)
    assert [i for i, cost in enumerate(costs, 1) if cost] == [1, 2, 4]
    nn.init.normal_(outer.weight)
    for _ in range(2):
        with pytest.raises(ProblemError, match="in which samples meet"):
            ode(x)


def test_a_coupling_between_looks_is_named_in_the_backward_pass():
    weight = torch.zeros((), dtype=torch.float64)
    ode, x = made(Plain(lambda t, x: -x * (1 + weight * x.square().mean(0))), checkpoint_bytes=0), spread()
    ode(x)
    ode(x)
    weight += 1.0
    y = ode(x.requires_grad_())
    with pytest.raises(OcnoptError, match='"kvaerno5" a field in which samples meet looks so too'):
        y.sum().backward()


def test_what_a_field_keeps_for_each_sample_may_stay():
    """A condition for each place of the batch, and buffers that move in every call."""
    condition, layer = start(5, 3), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3).double())
    ode = made(Plain(lambda t, x: torch.tanh(layer(x)) * condition + torch.sin(t)))
    ode.field.layer = layer
    assert ode(start(5, 3)).isfinite().all()


def test_what_has_one_step_for_all_is_refused():
    ode = made(Tanh())
    with pytest.raises(ProblemError, match=r"until\(\) met error_norm"):
        ode.until(lambda t, x: x[0, 0], start(2, 3))
    with pytest.raises(ProblemError, match="an observer of the steps met error_norm"):
        ode.observe(_Watcher())
    with pytest.raises(ProblemError, match="samples along the leading axis"):
        ode(start())
    with pytest.raises(ProblemError, match="samples along the leading axis"):
        ode((start(2, 3), start(3)))
    normal = nn.Sequential(nn.BatchNorm1d(3).double())
    with pytest.raises(ProblemError, match=r"samples meet.*eval\(\) for batch normalisation"):
        made(Plain(lambda t, x: normal(x)))(start(4, 3))


class _Watcher:
    def stage(self, input_weight, gradient_weight):
        raise AssertionError

    def terminal(self, x, slope, costate):
        raise AssertionError


def test_troubles_name_their_sample():
    x = torch.tensor([[0.1], [2.0]], dtype=torch.float64)
    with pytest.raises(ConvergenceError, match=r"\(sample 1\)"):
        made(Plain(lambda t, x: x**3 * 10))(x)
    with pytest.raises(NonFiniteError, match="of sample 1"):
        made(Plain(lambda t, x: (1 - x).sqrt()))(x)
    with pytest.raises(ConvergenceError, match="more than its 30 evaluations"):
        made(Plain(lambda t, x: -1e3 * x), max_evaluations=30)(x)
