"""SNOpt's rule: its steps in closed form, lr, which matrices it turns, steps that it takes back."""

import copy
import warnings

import pytest
import torch
from torch import nn

from ocnopt.errors import ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.optim.lengths import BOUNDS
from ocnopt.optim.snopt import SNOpt
from tests.optim.cases import Model, backward

pytestmark = pytest.mark.usefixtures("float64")


def spectral(G, UA, UB, M, s, damping, power):
    """The step of the rule, dense."""
    turned = UB.T @ M @ UA / (s + damping * s.mean()) ** power
    step = UB @ turned @ UA.T
    return step * M.norm() / s.mean().sqrt() / step.norm()


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("curvature", ["gradient", "costate"])
def test_first_steps_of_a_linear_layer(curvature, power):
    layer, x, lr, damping, momentum = nn.Linear(3, 2), torch.randn(7, 3), 0.02, 0.1, 0.8
    options = {"damping": damping, "momentum": momentum, "curvature": curvature, "power": power, "refresh_every": 10}
    optimizer = SNOpt(layer, lr, adaptation=0.0, **options)
    z = torch.cat([x, torch.ones(7, 1)], 1)
    W = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().clone()
    M = s = UA = UB = None
    gradients, kept, weight = [], [], lambda count, decay: (1 - decay) / (1 - decay**count)
    for k in range(5):
        g = 2 * (z @ W.T)  # gradients of each sample's own loss
        G = g.T @ z / 7
        gradients.append(G)
        M = G if M is None else M + weight(k + 1, momentum) * (G - M)
        if k in (0, 1, 3):
            decays = [0.95 ** (k - i) for i in range(k + 1)]
            pairs = list(zip(decays, gradients, strict=True))
            A, B = sum(d * H.T @ H for d, H in pairs), sum(d * H @ H.T for d, H in pairs)
            if curvature == "costate":
                A, B = z.T @ z, g.T @ g
                A, B = A / A.trace(), B / B.trace()
                kept = [(A, B)] if k == 0 else [*kept, ((A + kept[-1][0]) / 2, (B + kept[-1][1]) / 2)]
                A, B = kept[-1]
            (EA, VA), (EB, VB) = torch.linalg.eigh(A), torch.linalg.eigh(B)
            if k == 0:
                s = torch.outer(EB.clamp(min=0), EA.clamp(min=0))
                s = s * G.square().sum() / s.sum()
            else:
                s = (VB.T @ UB) ** 2 @ s @ ((VA.T @ UA) ** 2).T
            UA, UB = VA, VB
        s = s + weight(k + 2, 0.95) * ((UB.T @ G @ UA) ** 2 - s)
        W = W - lr * spectral(G, UA, UB, M, s, damping, power)
        backward(layer, x)
        optimizer.step()
        found = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
        torch.testing.assert_close(found, W, rtol=1e-6, atol=1e-8)


def test_a_step_is_as_long_as_lr_says_where_gradients_agree():
    layer = nn.Linear(30, 20, bias=False)
    before, gradient = layer.weight.detach().clone(), torch.randn(20, 30)
    for lr in (0.1, 0.01):
        optimizer = SNOpt(layer, lr, adaptation=0.0)
        for _ in range(3):
            before = layer.weight.detach().clone()
            layer.weight.grad = gradient.clone()
            optimizer.step()
            change = (layer.weight.detach() - before).square().mean().sqrt()
            assert float(change) == pytest.approx(lr, rel=1e-6)


@pytest.mark.parametrize(("size", "is_taken_back"), [(30.0, True), (-30.0, False), (8.0, False)])
def test_a_step_after_which_the_gradient_jumps_uphill_is_taken_back(size, is_taken_back):
    layer = nn.Linear(4, 3)
    optimizer = SNOpt(layer, 0.1, adaptation=0.0)

    def step(gradients):
        for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()

    def unit(tensors):
        norm = torch.cat([tensor.flatten() for tensor in tensors]).norm()
        return [tensor / norm for tensor in tensors]

    gradients = unit([torch.randn_like(parameter) for parameter in layer.parameters()])
    step(gradients)
    kept = [parameter.detach().clone() for parameter in layer.parameters()]
    step(gradients)
    last = unit([parameter.detach() - old for parameter, old in zip(layer.parameters(), kept, strict=True)])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        step([size * change for change in last])
    close = [torch.allclose(p, old, atol=1e-12) for p, old in zip(layer.parameters(), kept, strict=True)]
    assert close == [is_taken_back] * 2
    assert {*optimizer.factors.values()} == {0.25 if is_taken_back else 1.0}
    said = "raised the norm of the gradient, uphill along that step, from at most 1 to 30 and was taken back"
    assert [said in str(one.message) for one in heard] == [True] * is_taken_back
    # what came with the jump is no part of what is usual
    assert optimizer.state_dict()["norms"] == pytest.approx([1.0, 1.0] if is_taken_back else [1.0, 1.0, abs(size)])


def test_gradients_of_parameters_that_are_set_free_are_no_jump():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    optimizer, x = SNOpt(model, 0.1), torch.randn(5, 4)
    for _ in range(3):
        backward(model, x)
        optimizer.step()
    model[0].requires_grad_(True)
    for parameter in model[0].parameters():
        parameter.grad = 1e3 * torch.ones_like(parameter)
    for parameter in model[1].parameters():
        parameter.grad = optimizer.state[parameter]["change"].clone()
    optimizer.step()
    assert "change" in optimizer.state[model[0].weight]


class Mixed(nn.Module):
    """Modules whose matrices are found without hooks."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.up = nn.ConvTranspose1d(4, 4, 2, groups=2)
        self.gru, self.lstm = nn.GRUCell(4, 3), nn.LSTM(3, 3, batch_first=True)
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.free = nn.Parameter(torch.randn(3, 2))

    def forward(self, tokens):
        x = self.up(self.embedding(tokens).mT).mT
        states = [self.gru(x[:, 0])]
        for part in x[:, 1:].unbind(1):
            states.append(self.gru(part, states[-1]))
        states = self.lstm(torch.stack(states, 1))[0]
        return self.attention(states, states, states)[0] @ self.free


def test_every_matrix_is_preconditioned():
    model, tokens = Mixed(), torch.randint(5, (6, 3))
    with pytest.warns(UserWarning, match=r"embeddings, shared .* first-order update: 'embedding.weight'$"):
        optimizer = SNOpt(model, 0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(model(tokens).square().sum(-1).mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    groups = {
        name: state["moments"].shape
        for name, p in model.named_parameters()
        if "moments" in (state := optimizer.state[p])
    }
    assert {name: shape[0] for name, shape in groups.items()} == {
        "up.weight": 2,
        "gru.weight_ih": 3,
        "gru.weight_hh": 3,
        "lstm.weight_ih_l0": 4,
        "lstm.weight_hh_l0": 4,
        "attention.in_proj_weight": 3,
        "attention.out_proj.weight": 1,
        "free": 1,
    }


def test_inputs_wider_than_the_limit_keep_their_leading_directions(monkeypatch):
    monkeypatch.setattr("ocnopt.optim.bases.WIDEST", 5)
    monkeypatch.setattr("ocnopt.optim.bases.BESIDE_SHORT", 2)
    model, x = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 8)
    optimizer, losses = SNOpt(model, 0.02), []
    for _ in range(40):
        backward(model, x)
        losses.append(model(x).square().sum().item())
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    assert optimizer.state[model[0].weight]["input_vectors"].shape == (1, 9, 2)
    assert "input_factor" not in optimizer.state[model[0].weight]


class Stiffening(nn.Module):
    """A field whose evaluations rise steeply with its weight."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Linear(1, 1, bias=False)

    def forward(self, t, x):
        return x * 0.0 + torch.sin(200.0 * self.rate.weight * t) * self.rate.weight * 20.0


def test_a_step_that_makes_the_field_explode_is_taken_back():
    ode = NeuralODE(Stiffening(), rtol=1e-6, atol=1e-6)
    weight = ode.field.rate.weight
    nn.init.constant_(weight, 1e-3)
    optimizer, x = SNOpt(ode, 1e-6, adaptation=0.0), torch.ones(2, 1)
    for _ in range(6):
        backward(ode, x)
        optimizer.step()
    kept, usual = weight.detach().clone(), ode.statistics.forward
    optimizer.param_groups[0]["lr"] = 1.0
    backward(ode, x)
    optimizer.step()
    assert abs(float(weight.detach() - kept)) > 0.5
    backward(ode, x)
    assert ode.statistics.forward > 3 * usual
    with pytest.warns(UserWarning, match="raised the evaluations of the field from .* and was taken back"):
        optimizer.step()
    torch.testing.assert_close(weight.detach(), kept)
    assert optimizer.factors == {"field.rate.weight": 0.25}
    for _ in range(4):  # taken back again and again, without a word, each time shorter
        backward(ode, x)
        optimizer.step()
    assert max(optimizer.factors.values()) < 0.25


def lengths(optimizer, parameters):
    """Root mean square changes of the last step, over lr."""
    changes = [optimizer.state[parameter]["change"] for parameter in parameters]
    return [float(change.square().mean().sqrt()) / optimizer.param_groups[0]["lr"] for change in changes]


@pytest.mark.parametrize("curvature", ["gradient", "costate"])
def test_what_is_frozen_and_set_free_late_moves_by_steps_of_usual_length(curvature):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer, x = SNOpt(model, 1e-3, curvature=curvature, adaptation=0.0), torch.randn(200, 4)
    biases, weights = [model[0].bias, model[2].bias], [model[0].weight, model[2].weight]
    for i in range(90):
        for parameters, is_free in ((biases, not 30 <= i < 50), (weights, not 60 <= i < 80)):
            for parameter in parameters:
                parameter.requires_grad_(is_free)
        backward(model, x[torch.randint(200, (20,))])
        optimizer.step()
        free = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert max(lengths(optimizer, free)) < 2.0, i  # 5 to 80 where squares begin late
        assert not any("change" in optimizer.state[p] for p in model.parameters() if not p.requires_grad)
    assert "input_vectors" in optimizer.state[weights[0]]


@pytest.mark.parametrize(("start", "stop"), [(0, 30), (15, 60)])
def test_a_bias_that_is_set_free_late_does_not_throw_the_run_off(start, stop):
    model, x, y = (
        nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 5)),
        torch.randn(64, 30),
        torch.arange(64) % 5,
    )
    optimizer, losses = SNOpt(model), []
    for i in range(stop + 5):
        for layer in (model[0], model[2]):
            layer.bias.requires_grad_(not start <= i < stop)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if i == stop:  # the momentum from before was some thousand times as large
            assert max(lengths(optimizer, model.parameters())) < 10.0
    assert max(losses[stop:]) < 2.0 * losses[stop]


def jump(model, optimizer, x):
    """A step after which the gradient is a thousand times as large and points along the last change."""
    backward(model, x)
    for parameter in model.parameters():
        if "change" in optimizer.state[parameter]:
            parameter.grad = 1e6 * optimizer.state[parameter]["change"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()


def test_what_is_frozen_stays_where_it_is_when_a_step_is_taken_back():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer, x = SNOpt(model, 0.01), torch.randn(20, 4)
    for i in range(8):
        model[0].requires_grad_(i < 4)
        backward(model, x)
        optimizer.step()
    kept, moved = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    factors = optimizer.factors
    jump(model, optimizer, x)
    shortened = {name: max(BOUNDS[0], factor / 4.0) for name, factor in factors.items() if name.startswith("2")}
    assert optimizer.factors == {**factors, **shortened}
    assert torch.equal(model[0].weight, kept)
    assert not torch.equal(model[2].weight, moved)


@pytest.mark.parametrize("at", [9, 10])
def test_a_step_taken_back_counts_for_nothing(at):
    """The refresh that was due comes next, and a run resumed there goes on alike."""

    def make():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    model, x = make(), torch.randn(20, 4)
    optimizer, renewed = SNOpt(model, 0.01, curvature="costate"), []
    for i in range(14):
        before = optimizer.state[model[0].weight].get("input_vectors")
        if i == at:
            jump(model, optimizer, x)
            twin = make()
            twin.load_state_dict(model.state_dict())
            resumed = SNOpt(twin, 0.01, curvature="costate")
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            continue
        backward(model, x)
        optimizer.step()
        if optimizer.state[model[0].weight]["input_vectors"] is not before:
            renewed.append(i)
        if i > at:
            backward(twin, x)
            resumed.step()
            assert torch.equal(twin[0].weight, model[0].weight)
    assert renewed == [0, 1, 3, 5, 11]


def test_a_state_that_cannot_be_used_changes_nothing():
    ode = NeuralODE(Stiffening(), adjoint="backprop")
    optimizer = SNOpt(ode, 0.5)
    saved = SNOpt(NeuralODE(Stiffening()), 0.1, curvature="costate").state_dict()
    with pytest.raises(ProblemError, match="adjoint"):
        optimizer.load_state_dict(saved)
    assert (optimizer.curvature, optimizer.param_groups[0]["lr"]) == ("gradient", 0.5)
    backward(ode, torch.ones(2, 1))
    optimizer.step()


def test_a_basis_of_other_groups_is_made_anew():
    one, other = nn.Conv1d(4, 8, 3, groups=2), nn.Conv1d(2, 8, 3)
    first, second = SNOpt(one, 0.01), SNOpt(other, 0.01)
    backward(one, torch.randn(5, 4, 7))
    first.step()
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        backward(other, torch.randn(5, 2, 7))
        second.step()
    assert second.state[other.weight]["input_vectors"].shape == (1, 7, 7)


@pytest.mark.parametrize("curvature", ["gradient", "costate", "mixed"])
def test_a_power_of_two_times_the_loss_changes_no_bit_of_matrices(curvature):
    """Not those that move by Adam's rule, whose epsilon is a size."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 170), nn.Tanh(), nn.Linear(170, 4))
    convolution = nn.Sequential(
        nn.Conv1d(2, 4, 2, groups=2, padding="same", bias=False), nn.Flatten(), nn.Linear(12, 4)
    )
    for model, shape in ((plain, (6,)), (convolution, (2, 3)), (Model(), (2,))):
        pair = [model, copy.deepcopy(model)]
        optimizers = [SNOpt(each, curvature=curvature) for each in pair]
        for _ in range(12):
            x, y = torch.randn(9, *shape), torch.randint(2, (9,))
            for each, optimizer, scale in zip(pair, optimizers, (1.0, 2.0**12), strict=True):
                optimizer.zero_grad()
                (scale * nn.functional.cross_entropy(each(x), y)).backward()
                optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(*(each.parameters() for each in pair), strict=True))
