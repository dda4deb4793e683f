"""The policy for the integration time: exact where Gauss-Newton is, and its bookkeeping."""

import math

import pytest
import torch
from torch import nn

from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon
from ocnopt.optim.horizon_policy import HorizonPolicy

pytestmark = pytest.mark.usefixtures("float64")

HORIZON = FreeHorizon(initial=1.0, lower=0.2, upper=3.0)


class Drift(nn.Module):
    """dx/dt = theta, so x(T) = x(0) + theta T."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, t, x):
        return self.theta.expand_as(x)


def make(**options):
    ode = NeuralODE(Drift(), HORIZON, method="rk4", steps=2)
    return ode, HorizonPolicy(ode, **{"max_change": 3.0, "curvature": "published", "averaging": 0.0, **options})


def losses(x, w):
    """-log(4 - w.x): its Hessian is the outer product of its gradient: empirical Gauss-Newton is exact."""
    return -torch.log(4 - x @ w)


def exact(theta, T, x, w, c):
    """Q_T, Q_TT, Q_p and the Gauss-Newton Q_Tp of one sample, from the closed form of x(T)."""
    gradient = w / (4 - (x + theta * T) @ w)
    slope = gradient @ theta
    return c * T + slope, c + slope**2, T * gradient, T * gradient * slope


@pytest.mark.parametrize("c", [0.0, 0.3])
def test_feedback_is_newton_for_one_sample(c):
    ode, policy = make(penalty=c, lr=0.05)
    x, w, dp = torch.randn(1, 2), torch.tensor([0.7, -0.4]), torch.tensor([0.02, 0.05])
    theta = ode.field.theta.detach().clone()
    losses(ode(x), w).mean().backward()
    with torch.no_grad():
        ode.field.theta += dp
    policy.step()
    Q_T, Q_TT, Q_p, Q_Tp = exact(theta, 1.0, x[0], w, c)
    torch.testing.assert_close(ode.field.theta.grad, Q_p)
    torch.testing.assert_close(ode.T, 1.0 - 0.05 * (Q_T + Q_Tp @ dp) / Q_TT)


def test_a_mean_over_samples():
    ode, policy = make(penalty=0.3, lr=0.5)
    x, w = torch.randn(6, 2), torch.tensor([0.7, -0.4])
    dp = torch.tensor([0.01, -0.02])
    theta = ode.field.theta.detach().clone()
    losses(ode(x), w).mean().backward()
    with torch.no_grad():
        ode.field.theta += dp
    policy.step()
    parts = [exact(theta, 1.0, row, w, 0.3) for row in x]
    Q_T, Q_TT, Q_p = (sum(part[i] for part in parts) / 6 for i in range(3))
    Q_Tp = (Q_T - 0.3) * Q_p  # a product of means, as published
    torch.testing.assert_close(ode.T, 1.0 - 0.5 * (Q_T + Q_Tp @ dp) / Q_TT)


def test_a_mean_over_iterations_in_the_product_of_means_too():
    ode, policy = make(penalty=0.3, lr=0.05, every=3, averaging=0.9)
    w, theta, found = torch.tensor([0.7, -0.4]), ode.field.theta.detach().clone(), []
    for i in range(4):
        x, dp, T = torch.randn(6, 2), torch.tensor([0.01, -0.02]) * (i == 3), float(ode.T)
        ode.field.theta.grad = None
        losses(ode(x), w).mean().backward()
        with torch.no_grad():
            ode.field.theta += dp
        before = ode.T.clone()
        policy.step()
        parts = [exact(theta, T, row, w, 0.0) for row in x]
        found.append([sum(part[j] for part in parts) / 6 for j in range(3)])
    Q_T, Q_TT = (sum(one[j] for one in found[1:]) / 3 for j in range(2))
    past = 0.1 * Q_TT + 0.09 * found[0][1]  # with weights .1 and .09 of the two updates
    change = (0.3 * before + Q_T + Q_T * (found[3][2] @ dp)) / (0.3 + past / 0.19)
    torch.testing.assert_close(ode.T, before - 0.05 * change)


def test_first_and_second_derivative_against_finite_differences():
    ode, _ = make()
    x, w, h = torch.randn(5, 2), torch.tensor([0.7, -0.4]), 1e-4
    theta = ode.field.theta.detach()

    def cost(T):
        return losses(x + theta * T, w).mean() + 0.15 * T**2

    parts = [exact(theta, 1.0, row, w, 0.3) for row in x]
    Q_T, Q_TT = (sum(part[i] for part in parts) / 5 for i in range(2))
    torch.testing.assert_close(Q_T, (cost(1 + h) - cost(1 - h)) / (2 * h), rtol=1e-6, atol=0)
    torch.testing.assert_close(Q_TT, (cost(1 + h) - 2 * cost(1.0) + cost(1 - h)) / h**2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", ["feedback", "adjoint"])
def test_a_sum_over_samples(rule):
    x, w = torch.randn(4, 2), torch.tensor([0.7, -0.4])
    ode, policy = make(rule=rule, reduction="sum", lr=0.05)
    losses(ode(x), w).sum().backward()
    policy.step()
    parts = [exact(ode.field.theta.detach(), 1.0, row, w, 0.0) for row in x]
    Q_T, Q_TT = (sum(part[i] for part in parts) for i in range(2))
    torch.testing.assert_close(ode.T, 1.0 - 0.05 * (Q_T / Q_TT if rule == "feedback" else Q_T))


def test_adjoint_is_gradient_descent():
    ode, policy = make(rule="adjoint", lr=0.2, penalty=0.3)
    x, w = torch.randn(3, 2), torch.tensor([0.7, -0.4])
    losses(ode(x), w).mean().backward()
    Q_T = sum(exact(ode.field.theta.detach(), 1.0, row, w, 0.3)[0] for row in x) / 3
    policy.step()
    torch.testing.assert_close(ode.T, 1.0 - 0.2 * Q_T)


def test_several_solves_by_the_same_samples():
    ode, policy = make(rule="adjoint", lr=0.1)
    x, w, h = torch.randn(3, 2), torch.tensor([0.7, -0.4]), 1e-5
    losses(ode(torch.tanh(ode(x))), w).mean().backward()
    theta = ode.field.theta.detach()
    up, down = (losses(torch.tanh(x + theta * T) + theta * T, w).mean() for T in (1 + h, 1 - h))
    policy.step()
    torch.testing.assert_close(ode.T, 1.0 - 0.1 * (up - down) / (2 * h), rtol=1e-8, atol=0)


def test_accumulated_gradients_are_of_other_samples():
    x, w = torch.randn(6, 2), torch.tensor([0.7, -0.4])
    (whole, one), (parts, other) = make(penalty=0.2), make(penalty=0.2)
    losses(whole(x), w).mean().backward()
    for part in x.split([4, 2]):
        (losses(parts(part), w).sum() / 6).backward()
    one.step()
    other.step()
    torch.testing.assert_close(parts.T, whole.T)


def test_a_change_counts_once():
    """Each update uses the change of the parameters since its own backward pass, not since the last update."""
    ode, policy = make(penalty=0.3, every=2)
    x, w, c = torch.randn(1, 2), torch.tensor([0.7, -0.4]), 0.3
    for k in range(4):
        theta, T = ode.field.theta.detach().clone(), ode.T.clone()
        ode.zero_grad()
        losses(ode(x), w).mean().backward()
        dp = torch.tensor([0.01, 0.02]) * (k + 1)
        with torch.no_grad():
            ode.field.theta += dp
        policy.step()
        Q_T, Q_TT, _, Q_Tp = exact(theta, T, x[0], w, c)
        expected = T if k % 2 else T - (Q_T + Q_Tp @ dp) / Q_TT
        torch.testing.assert_close(ode.T, expected.clamp(0.2, 3.0))


def test_nothing_watches_between_updates():
    ode, policy = make(every=3)
    watched = []
    for _ in range(6):
        watched.append(bool(ode._observers))
        ode.zero_grad()
        ode(torch.randn(2, 2)).sum(1).mean().backward()
        policy.step()
    assert watched == [True, False, False] * 2


def test_steps_are_short_and_end_at_the_bounds():
    ode, policy = make(max_change=0.1)
    for _ in range(3):
        (1e-9 * ode(torch.ones(2, 2)).sum()).backward()  # a tiny Q_TT asks for a huge step
        before = ode.T.clone()
        policy.step()
        assert abs(ode.T - before) <= 0.1 * before + 1e-12
    for _ in range(30):
        (1e-9 * ode(torch.ones(2, 2)).sum()).backward()
        policy.step()
    assert ode.T in (HORIZON.lower, HORIZON.upper)


def test_no_signal_leaves_T():
    ode, policy = make()
    (0.0 * ode(torch.ones(2, 2)).sum()).backward()
    policy.step()
    assert ode.T == 1.0


def test_resuming_gives_an_unbroken_run_bit_for_bit():
    def build():
        ode, policy = make(every=2, penalty=0.3, lr=0.3, averaging=0.9, curvature="gauss_newton")
        return ode, policy, torch.optim.SGD(ode.parameters(), 0.1)

    def train(ode, policy, optimizer, batches):
        for x in batches:
            optimizer.zero_grad()
            losses(ode(x), torch.tensor([0.7, -0.4])).mean().backward()
            optimizer.step()
            policy.step()

    batches = torch.randn(7, 4, 2)
    unbroken, resumed = build(), build()
    train(*unbroken, batches)
    train(*resumed, batches[:3])
    again = build()
    for part, old in zip(again, resumed, strict=True):
        part.load_state_dict(old.state_dict())
    train(*again, batches[3:])
    assert torch.equal(again[0].T, unbroken[0].T)
    assert torch.equal(again[0].field.theta, unbroken[0].field.theta)


def test_an_empty_batch_leaves_T_to_the_penalty():
    for penalty, expected in ((0.0, 1.0), (0.5, 0.5)):
        ode, policy = make(rule="adjoint", penalty=penalty)
        ode(torch.ones(0, 2)).sum().backward()
        policy.step()
        assert float(ode.T) == expected


def test_one_sample_without_a_batch_axis():
    (alone, one), (batch, other) = make(penalty=0.3), make(penalty=0.3)
    x, w = torch.randn(2), torch.tensor([0.7, -0.4])
    losses(alone(x), w).backward()
    losses(batch(x[None]), w).mean().backward()
    one.step()
    other.step()
    torch.testing.assert_close(alone.T, batch.T)


def test_calls_in_the_wrong_order():
    ode, policy = make()
    with pytest.raises(ProblemError, match="met no backward pass through the NeuralODE since the last step"):
        policy.step()
    ode(torch.ones(2, 2)).sum().backward()
    ode.zero_grad()
    with pytest.raises(
        ProblemError, match="met parameters without gradients; expected those of the last backward pass"
    ):
        policy.step()


def test_a_loss_that_is_not_finite_leaves_T():
    ode, policy = make()
    (math.nan * ode(torch.ones(2, 2)).sum()).backward()
    with pytest.raises(
        NonFiniteError, match=r"dL/dT is nan, or the change of T; expected finite numbers. T stays at 1.0"
    ):
        policy.step()
    assert ode.T == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "feedbak"}, r"rule is 'feedbak'; expected 'feedback' or 'adjoint'; did you mean 'feedback'"),
        ({"lr": -1.0}, r"lr is -1.0; expected a number >= 0"),
        ({"penalty": -1.0}, r"penalty is -1.0; expected a number >= 0"),
        ({"every": 0}, r"every is 0; expected a whole number of at least 1, 1 by default"),
        ({"reduction": "none"}, r"reduction is 'none'; expected 'mean' or 'sum'"),
        ({"max_change": 0.0}, r"max_change is 0.0; expected a number > 0, 0.8 by default"),
        ({"averaging": 1.0}, r"averaging is 1.0; expected a number in \[0, 1\), 0.9 by default"),
        ({"curvature": "exakt"}, r"curvature is 'exakt'; expected 'gauss_newton' or 'published' or 'exact'; did you"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ProblemError, match=message):
        make(**options)


def test_wrong_modules():
    with pytest.raises(ProblemError, match="the NeuralODE has the horizon .*; expected a free one"):
        HorizonPolicy(NeuralODE(Drift()), lr=0.1)
    with pytest.raises(ProblemError, match="neural_ode is Linear; expected the NeuralODE itself"):
        HorizonPolicy(nn.Linear(2, 2), lr=0.1)
    _, policy = make()
    with pytest.raises(ProblemError, match=r"the state holds \['state'\]; expected the 'count'"):
        policy.load_state_dict({"state": 1})
    with pytest.raises(ProblemError, match=r"the state holds \['count', 'momentum'\]; expected the 'count'"):
        policy.load_state_dict({"count": 1, "momentum": 2})
    with pytest.raises(ProblemError, match="rule is 'foo'; expected 'feedback' or 'adjoint'"):
        policy.load_state_dict({**policy.state_dict(), "count": 7, "rule": "foo"})
    assert policy.state_dict()["count"] == 0


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "the state is NoneType; expected a dict: load what"),
        ({"count": -1}, "'count' is -1; expected a whole number >= 0: load what"),
        ({"count": 1.5}, "'count' is 1.5; expected a whole number >= 0: load what"),
        ({"past": (float("nan"), 1)}, r"'past' is \(nan, 1\); expected a pair of finite numbers.*: load what"),
        ({"past": (1.0, -1.0)}, r"'past' is \(1.0, -1.0\); expected a pair .* the second >= 0: load what"),
        ({"seen": [("a", 1.0)]}, r"'seen' is \[\('a', 1.0\)\]; expected a list of pairs of finite numbers"),
        ({"seen": 3}, "'seen' is 3; expected a list of pairs of finite numbers"),
    ],
)
def test_numbers_that_no_policy_has_saved(state, message):
    _, policy = make()
    before = policy.state_dict()
    with pytest.raises(ProblemError, match=message):
        policy.load_state_dict(None if state is None else {**before, **state})
    assert policy.state_dict() == before


def test_its_options_come_back_with_its_state():
    options = {"lr": 0.2, "penalty": 0.3, "every": 4, "rule": "adjoint", "reduction": "sum", "max_change": 0.2}
    options |= {"curvature": "exact", "averaging": 0.5}
    _, policy = make(**options)
    _, other = make()
    other.load_state_dict(policy.state_dict())
    assert {name: getattr(other, name) for name in options} == options
    other.load_state_dict({"count": 3})  # as version 0.1 saved it
    other.load_state_dict({"count": 3, "rule": "feedback", "lr": 0.2, "penalty": 0.3, "every": 4})
    assert (other.rule, other.every, other.reduction) == ("feedback", 4, "sum")


class Clock(nn.Module):
    """dx/dt = w cos t: what x(t) gains from s to t is w (sin t - sin s)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.3))

    def forward(self, t, x):
        return self.w * torch.cos(t) * torch.ones_like(x)


def moved(run):
    """The Q_T that a policy applies after ``run(ode)`` gave a loss."""
    ode = NeuralODE(Clock(), FreeHorizon(1.0, 0.1, 3.0), method="rk4", steps=40)
    policy = HorizonPolicy(ode, rule="adjoint", lr=1e-2)
    run(ode).backward()
    policy.step()
    return (1.0 - float(ode.T)) / 1e-2


def test_output_times_count_as_far_as_they_depend_on_T():
    x, h = torch.randn(4, 2), 1e-5

    def square(y):
        return y.square().sum(-1).mean()

    def at_end(T):
        return square(x + 1.3 * math.sin(T))

    slope = float(at_end(1 + h) - at_end(1 - h)) / (2 * h)
    early = float(square(x + 1.3 * math.sin(0.5)))
    assert moved(lambda ode: square(ode(x))) == pytest.approx(slope, rel=1e-6)
    # an early output is held, and counts with its value
    both = moved(lambda ode: square(ode(x, [0.5, 1.0])[0]) * square(ode(x, times=[0.5, 1.0])[-1]))
    assert both == pytest.approx(early * slope, rel=1e-6)
    for times in ([0.3, 0.6], [0.5, 1.7], [0.0, 0.6]):
        beside = moved(lambda ode: square(ode(x)) + square(ode(x, times)[-1]))  # noqa: B023
        assert beside == pytest.approx(slope, rel=1e-6)
        with pytest.raises(
            ProblemError, match=r"met no backward pass .* none that ended at T; .*end at float\(ode.T\)"
        ):
            moved(lambda ode: square(ode(x, times)[-1]))  # noqa: B023


@pytest.mark.parametrize("times", [[1.0, 0.5, 0.2], [0.5, 0.2], [0.5, 1.0, 1.7]])
def test_times_that_start_from_T_or_go_past_it_are_refused(times):
    with pytest.raises(ProblemError, match="with T = 1 before the last; expected T as the last, or not at all"):
        moved(lambda ode: ode(torch.ones(4, 2), times)[-1].sum())
    ode, _ = make()
    with torch.no_grad():
        assert ode(torch.ones(4, 2), times).shape == (len(times), 4, 2)


@pytest.mark.parametrize("when", [1, 2])
def test_an_iteration_that_went_wrong_does_not_rule_T(when):
    ends = []
    for scale in (1.0, 1e4):
        ode, policy = make(every=3, penalty=0.3, averaging=0.9)
        x, w = torch.tensor([[0.3, -0.1], [0.2, 0.5]]), torch.tensor([0.7, -0.4])
        for i in range(7):  # updates at 0, 3 and 6
            ode.zero_grad()
            (losses(ode(x), w).mean() * (scale if i == when else 1.0)).backward()
            policy.step()
        ends.append(float(ode.T))
    assert ends[0] == ends[1]
    assert ends[0] != 1.0
