"""The feedback rule's second derivatives against brute force: per-sample gradients, and differentiate()."""

import copy

import pytest
import torch
from torch import nn

from ocnopt.differential.differentiate import differentiate
from ocnopt.errors import ProblemError
from ocnopt.modules import from_module
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon
from ocnopt.optim.horizon_policy import HorizonPolicy

pytestmark = pytest.mark.usefixtures("float64")

c, ETA, DP = 0.3, 0.02, 0.03


class Field(nn.Module):
    """Depends on time, mixes channels; of a tuple it moves the first part with the second, and the other way round."""

    def __init__(self, width=3):
        super().__init__()
        self.inner = nn.Linear(width + 1, width)

    def forward(self, t, x):
        if isinstance(x, tuple):
            return torch.tanh(x[1]) * self.inner.weight[0, 0], self.inner(torch.cat([x[0], x[1][:, :1]], 1))
        return torch.tanh(self.inner(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1)))


def make(**options):
    torch.manual_seed(3)
    solve = {name: options.pop(name) for name in ("method", "steps", "dense", "checkpoint_bytes") if name in options}
    ode = NeuralODE(Field(), FreeHorizon(1.0, 0.2, 3.0), **({"method": "rk4", "steps": 16} | solve))
    return ode, HorizonPolicy(
        ode, **{"curvature": "gauss_newton", "lr": ETA, "max_change": 1.0, "penalty": c, **options}
    )


def losses(x):
    """(B,) losses of ends ``(..., B, 3)``."""
    return torch.log(2.0 + (x * torch.tensor([1.0, -2.0, 0.5])).sum(-1).sin()).reshape(-1, x.shape[-2]).sum(0)


def plainly(ode, x):
    return losses(ode(x))


def twice(ode, x):
    return losses(ode(torch.sin(ode(x))))


def at_times(ode, x):
    return losses(ode(x, [0.4, float(ode.T)]))


def beside_an_early_end(ode, x):
    return losses(ode(x)) * losses(ode(x, [0.3, 0.6])[-1])


def of_a_tuple(ode, x):
    first, second = ode((x, x.cos()))
    return losses(first) + losses(second)


def moved(ode):
    with torch.no_grad():
        for parameter in ode.parameters():
            parameter += DP * torch.sin(torch.arange(1.0, 1 + parameter.numel())).view_as(parameter)


def by_hand(ode, run, x):
    """Shares s_i by differences in T with earlier times held, and g_i . dp by the gradient of each sample alone."""
    start, h = copy.deepcopy(ode), 1e-5
    ends = copy.deepcopy(ode)
    moved(ends)
    dp = [(after - before).detach() for after, before in zip(ends.parameters(), start.parameters(), strict=True)]
    s, along = [], []
    for row in x.split(1):
        (up, down) = (copy.deepcopy(start) for _ in range(2))
        up.T.add_(h)
        down.T.sub_(h)
        s.append(((run(up, row) - run(down, row)) / (2 * h)).item())
        g = torch.autograd.grad(run(start, row).sum(), [*start.parameters()])
        along.append(sum(float((a * b).sum()) for a, b in zip(g, dp, strict=True)))
    return torch.tensor(s), torch.tensor(along)


RUNS = [plainly, twice, at_times, beside_an_early_end, of_a_tuple]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("curvature", ["gauss_newton", "published"])
def test_the_rule_equals_brute_force(run, curvature):
    ode, policy = make(curvature=curvature)
    x = torch.randn(2, 3)
    s, along = by_hand(ode, run, x)
    run(ode, x).mean().backward()
    moved(ode)
    after = [parameter.detach().clone() for parameter in ode.parameters()]
    policy.step()
    response = (s * along).mean() if curvature == "gauss_newton" else s.mean() * along.mean()
    expected = 1.0 - ETA * (c + s.mean() + response) / (c + s.square().mean())
    torch.testing.assert_close(ode.T, expected, rtol=1e-8, atol=0)
    assert all(torch.equal(now, then) for now, then in zip(ode.parameters(), after, strict=True))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("checkpoint_bytes", [0, 2**28])
def test_any_way_of_keeping_a_path_gives_the_same(dense, checkpoint_bytes):
    options = {"method": "dopri5", "dense": dense, "checkpoint_bytes": checkpoint_bytes}
    ode, policy = make(**options)
    x = torch.randn(2, 3)
    s, along = by_hand(ode, at_times, x)
    at_times(ode, x).mean().backward()
    moved(ode)
    policy.step()
    expected = 1.0 - ETA * (c + s.mean() + (s * along).mean()) / (c + s.square().mean())
    # step sizes are chosen for a whole batch, and count as constants
    torch.testing.assert_close(ode.T, expected, rtol=1e-4, atol=0)


def test_accumulated_and_scaled_passes_are_one_batch():
    x, scaler = torch.randn(6, 3), torch.amp.GradScaler("cpu", init_scale=256.0)
    (whole, one), (parts, other) = make(), make(scaler=scaler)
    plainly(whole, x).mean().backward()
    for part in x.split([4, 2]):
        scaler.scale(plainly(parts, part).sum() / 6).backward()
    for ode, policy in ((whole, one), (parts, other)):
        moved(ode)
        policy.step()
    torch.testing.assert_close(parts.T, whole.T, rtol=1e-12, atol=0)


class Noisy(Field):
    """Dropout: another draw would be another gradient."""

    def forward(self, t, x):
        return nn.functional.dropout(super().forward(t, x), 0.5, self.training)


def test_a_solve_is_taken_again_with_its_random_numbers():
    ode = NeuralODE(Noisy(), FreeHorizon(1.0, 0.2, 3.0), method="rk4", steps=2)
    policy = HorizonPolicy(ode, curvature="gauss_newton", lr=ETA)
    x = torch.randn(1, 3)
    plainly(ode, x).mean().backward()
    gradient = [parameter.grad.clone() for parameter in ode.parameters()]
    before = [parameter.detach().clone() for parameter in ode.parameters()]
    moved(ode)
    state = torch.get_rng_state()
    (samples,) = policy._shares.take()
    s = float(samples.shares)
    along = sum((g * (p - b)).sum().item() for g, p, b in zip(gradient, ode.parameters(), before, strict=True))
    policy.step()
    torch.testing.assert_close(ode.T, torch.tensor(1.0 - ETA * (s + s * along) / s**2), rtol=1e-10, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_exact_second_derivatives_are_those_of_differentiate():
    ode, policy = make(curvature="exact")
    x = torch.randn(4, 3)
    problem = from_module(ode.field, losses_of_ends, initial_state=x, horizon=FreeHorizon(1.0, 0.2, 3.0))
    oracle = differentiate(problem, rtol=1e-9, atol=1e-9)

    def closure():
        return losses_of_ends(0.0, ode(x)).mean()

    closure().backward()
    before = torch.cat([parameter.detach().flatten() for parameter in ode.parameters()])
    moved(ode)
    dp = torch.cat([parameter.detach().flatten() for parameter in ode.parameters()]) - before
    policy.step(closure)
    expected = 1.0 - ETA * (c + oracle.T + oracle.Tp @ dp) / abs(c + oracle.TT)
    torch.testing.assert_close(ode.T, expected, rtol=1e-8, atol=0)
    assert (ode.adjoint, type(ode.field)) == ("discrete", Field)


def losses_of_ends(t, x):
    return torch.log(2.0 + (x * torch.tensor([1.0, -2.0, 0.5])).sum(-1).sin())


def test_what_an_exact_update_needs():
    ode, policy = make(curvature="exact")
    x = torch.randn(2, 3)
    for closure, message in [
        (None, r"came without a closure for curvature='exact'; expected policy.step\(closure\)"),
        (lambda: 1.0, r"the closure of policy.step\(\) returned 1.0; expected the loss, a tensor of one number"),
        (lambda: ode(x), r"returned a tensor of shape \(2, 3\); expected the loss"),
        (lambda: plainly(ode, x).mean().detach(), "graph does not lead through the solve.*: leave out detach"),
        (lambda: torch.no_grad()(plainly)(ode, x).mean(), "graph does not lead through the solve"),
        (
            lambda: (plainly(ode, x).detach() * next(ode.parameters()).sum()).mean(),
            "graph does not lead through the solve",
        ),
        (lambda: at_times(ode, x).mean(), r"curvature='exact' met a solve with output times; expected ode\(x\)"),
    ]:
        ode.zero_grad()
        plainly(ode, x).mean().backward()
        with pytest.raises(ProblemError, match=message):
            policy.step(closure)
        assert (float(ode.T), ode.adjoint) == (1.0, "discrete")


def test_the_first_iteration_moves_T_and_later_updates_use_the_means_since():
    (ode, policy), (other, last) = make(every=3, lr=0.4), make(every=3, lr=0.4, averaging=0.0)
    batches, shares, watched, T = torch.randn(4, 2, 3), [], [], [torch.tensor(1.0)]
    for x in batches:
        s, _ = by_hand(ode, plainly, x)
        shares.append(s)
        watched.append((bool(ode._observers), bool(other._observers)))
        for each, moves in ((ode, policy), (other, last)):
            each.zero_grad()
            plainly(each, x).mean().backward()
            moves.step()
        T.append(ode.T.clone())
    assert watched == [(True, True), (True, False), (True, False), (True, True)]
    assert T[1] == T[2] == T[3]
    s = torch.stack(shares)
    torch.testing.assert_close(T[1], 1.0 - 0.4 * (c + s[0].mean()) / (c + s[0].square().mean()), rtol=1e-8, atol=0)
    Q_TT = c + (0.9 * s[0].square().mean() + s[1:].square().mean()) / 1.9
    torch.testing.assert_close(T[4], T[1] - 0.4 * (c * T[1] + s[1:].mean()) / Q_TT, rtol=1e-8, atol=0)
    alone = T[1] - 0.4 * (c * T[1] + s[3].mean()) / (c + s[3].square().mean())
    torch.testing.assert_close(other.T, alone, rtol=1e-8, atol=0)


def test_Q_TT_is_a_running_mean_over_updates():
    ode, policy = make(averaging=0.75)
    total = weight = 0.0
    for x in torch.randn(3, 2, 3):
        T, (s, _) = ode.T.clone(), by_hand(ode, plainly, x)
        total, weight = 0.75 * total + 0.25 * s.square().mean(), 0.75 * weight + 0.25
        ode.zero_grad()
        plainly(ode, x).mean().backward()
        policy.step()
        torch.testing.assert_close(ode.T, T - ETA * (c * T + s.mean()) / (c + total / weight), rtol=1e-8, atol=0)


def test_each_of_several_blocks_has_a_policy_of_its_own():
    x = torch.randn(2, 3)
    blocks = [make()[0] for _ in range(2)]
    policies = [HorizonPolicy(block, curvature="gauss_newton", lr=ETA, penalty=c, max_change=1.0) for block in blocks]
    model = nn.Sequential(blocks[0], nn.Tanh(), blocks[1])
    losses(model(x)).mean().backward()

    def first(ode, row):
        return losses(blocks[1](torch.tanh(ode(row))))

    def second(ode, row):
        return losses(ode(torch.tanh(blocks[0](row))))

    expected = []
    for block, run in zip(blocks, (first, second), strict=True):
        s, along = by_hand(block, run, x)
        expected.append(1.0 - ETA * (c + s.mean() + (s * along).mean()) / (c + s.square().mean()))
    for block in blocks:
        moved(block)
    for policy in policies:
        policy.step()
    torch.testing.assert_close(torch.stack([block.T for block in blocks]), torch.stack(expected), rtol=1e-8, atol=0)


@pytest.mark.parametrize("rule", ["feedback", "adjoint"])
def test_an_event_before_T_leaves_T(rule):
    ode, policy = make(rule=rule)
    time, _ = ode.until(lambda t, x: t - 0.4, torch.randn(2, 3))
    time.backward()
    with pytest.raises(ProblemError, match="met no backward pass through the NeuralODE since the last step"):
        policy.step()
    assert float(ode.T) == 1.0


@pytest.mark.parametrize(
    ("curvature", "times"),
    [("published", None), ("gauss_newton", [[0.2, 0.4], [1.0, 1.0]]), ("gauss_newton", None), ("exact", None)],
)
def test_samples_with_steps_of_their_own(curvature, times):
    field, x, ends = Field(), torch.randn(2, 3), []
    for error_norm in ("batch", "sample"):
        ode = NeuralODE(copy.deepcopy(field), FreeHorizon(1.0, 0.2, 3.0), rtol=1e-10, atol=1e-10, error_norm=error_norm)
        policy = HorizonPolicy(ode, curvature=curvature, lr=ETA, penalty=c, max_change=1.0)

        def evaluate(ode=ode):
            path = ode(x) if times is None or ode.error_norm == "batch" else ode(x, torch.tensor(times))[-1]
            return losses(path).mean()

        evaluate().backward()
        moved(ode)
        policy.step(evaluate)
        ends.append(ode.T)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-8, atol=0)


@pytest.mark.parametrize("given", [torch.tensor, list, lambda rows: [*torch.tensor(rows)]])
def test_ends_of_samples_with_steps_of_their_own(given):
    ode, x = NeuralODE(Field(), FreeHorizon(1.0, 0.2, 3.0), error_norm="sample"), torch.randn(2, 3)
    policy = HorizonPolicy(ode)
    with pytest.raises(ProblemError, match="with T = .* before the last; expected T as the last, or not at all"):
        ode(x, given([[0.2, 0.4], [0.8, 1.0], [1.2, 1.2]]))
    ode(x, given([[0.7, 0.9]]))[-1].sum().backward()
    with pytest.raises(ProblemError, match="none that ended at T"):
        policy.step()


@pytest.mark.parametrize("curvature", ["gauss_newton", "published"])
def test_samples_that_end_before_T_share_nothing(curvature):
    ode = NeuralODE(Field(), FreeHorizon(1.0, 0.2, 3.0), rtol=1e-6, atol=1e-6, error_norm="sample")
    policy = HorizonPolicy(ode, curvature=curvature, lr=ETA, penalty=c, max_change=1.0)
    x = torch.tensor([[-0.4, 1.1, 0.3], [0.8, -0.2, 0.5], [0.1, 0.6, -0.9]])

    def run(ode, x):
        return losses(ode(x, torch.where(x[:, 0] < 0, 0.7, ode.T)[None])[-1])

    s, along = by_hand(ode, run, x)
    run(ode, x).mean().backward()
    moved(ode)
    policy.step()
    response = (s * along).mean() if curvature == "gauss_newton" else s.mean() * along.mean()
    assert s[0] == 0 < s.abs()[1:].min()
    torch.testing.assert_close(
        ode.T, 1.0 - ETA * (c + s.mean() + response) / (c + s.square().mean()), rtol=1e-7, atol=0
    )
