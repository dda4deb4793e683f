"""SNOpt as a user meets it: one step in closed form, resuming bit for bit, frozen parts, other parameters."""

import copy
import io

import pytest
import torch
from torch import nn

from ocnopt.differential.kronecker import is_layer
from ocnopt.errors import ProblemError
from ocnopt.optim.snopt import SNOpt
from tests.optim.cases import Net, backward, data, gathering, train

pytestmark = pytest.mark.usefixtures("float64")


def test_the_loss_falls():
    model = Net()
    optimizer = gathering(model, lr=0.02)
    losses = train(model, optimizer, list(zip(*data(2), strict=True)) * 20)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("curvature", ["gradient", "costate"])
@pytest.mark.parametrize("stop", [1, 4, 5, 6])
def test_resuming_gives_an_unbroken_run_bit_for_bit(stop, curvature):
    def make():
        torch.manual_seed(3)
        model = Net().float()
        optimizer = SNOpt(model, refresh_every=6, weight_decay=1e-3, curvature=curvature)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)

    batches = [(x.float(), y) for x, y in zip(*data(8), strict=True)]
    model, optimizer, scheduler = make()
    train(model, optimizer, batches, scheduler)
    first, first_optimizer, first_scheduler = make()
    train(first, first_optimizer, batches[:stop], first_scheduler)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (first, first_optimizer, first_scheduler)], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    resumed = make()
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    train(resumed[0], resumed[1], batches[stop:], resumed[2])
    assert optimizer.factors == resumed[1].factors
    for a, b in zip(model.parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_options_come_back_with_the_state():
    model = Net()
    ours = gathering(model, 0.01, refresh_every=6, reduction="sum", everywhere=False)
    resumed = gathering(model)
    resumed.load_state_dict(ours.state_dict())
    assert (resumed.refresh_every, resumed.reduction, resumed.everywhere) == (6, "sum", False)
    assert [block.name for block in resumed._blocks] == ["ode.field.conv"]
    older = {key: ours.state_dict()[key] for key in ("state", "param_groups", "step_count")}
    resumed.load_state_dict(older)  # of a version that saved none
    assert resumed.refresh_every == 6
    with pytest.raises(ProblemError, match="refresh_every is 0; expected a whole number of at least 1"):
        resumed.load_state_dict({**ours.state_dict(), "refresh_every": 0})


def test_a_resumed_run_refreshes_when_the_first_would_have():
    batches = list(zip(*data(9), strict=True))

    def make(**options):
        torch.manual_seed(3)
        model = Net()
        return model, gathering(model, **options)

    model, optimizer = make(refresh_every=3)
    train(model, optimizer, batches)
    first, first_optimizer = make(refresh_every=3)
    train(first, first_optimizer, batches[:4])
    resumed, other = make()
    resumed.load_state_dict(first.state_dict())
    other.load_state_dict(first_optimizer.state_dict())
    train(resumed, other, batches[4:])
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loaded_state_is_a_copy_and_keeps_its_precision():
    model = nn.Sequential(nn.Linear(3, 2)).to(torch.bfloat16)
    optimizer = gathering(model, 0.01)
    x = torch.randn(4, 3, dtype=torch.bfloat16)
    backward(model, x)
    optimizer.step()
    state = optimizer.state_dict()
    other = gathering(model, 0.01)
    other.load_state_dict(state)
    weight = model[0].weight
    assert weight.dtype == torch.bfloat16
    assert "moments" in optimizer.state[weight]
    for key, value in optimizer.state[weight].items():
        if not isinstance(value, torch.Tensor):
            continue
        assert key == "step" or value.dtype == torch.float32
        assert torch.equal(other.state[weight][key], value)
        assert other.state[weight][key].data_ptr() != value.data_ptr()


def test_the_state_of_another_optimiser_is_refused():
    layer = nn.Linear(3, 2)
    with pytest.raises(ProblemError, match=r"holds \['param_groups', 'state'\]; expected the state of an SNOpt"):
        gathering(layer, 0.01).load_state_dict(torch.optim.Adam(layer.parameters()).state_dict())
    optimizer = SNOpt(layer)
    backward(layer, torch.randn(4, 3))
    optimizer.step()
    others = [
        (nn.Linear(3, 5), r"another model: weight \(2, 3\) instead of \(5, 3\), bias .*; expected .*: load it into an"),
        (
            nn.Linear(3, 2, bias=False),
            r"the state holds groups of \[2\] parameters; expected \[1\] as here, 'weight': load",
        ),
    ]
    for other, message in others:
        with pytest.raises(ProblemError, match=message):
            SNOpt(other).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 65536.0])
def test_the_scale_of_the_loss_does_not_matter(scale):
    def run(factor, reduction):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        optimizer, x = gathering(model, 0.01, reduction=reduction), torch.randn(5, 3)
        for _ in range(7):
            optimizer.zero_grad()
            losses = model(x).square().sum(1)
            (factor * (losses.mean() if reduction == "mean" else losses.sum())).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(run(scale, "mean"), run(1.0, "mean"))
    torch.testing.assert_close(run(scale, "sum"), run(1.0, "mean"))


def test_weight_decay_is_a_term_of_the_loss():
    def run(weight_decay):
        torch.manual_seed(0)
        model, x = nn.Linear(3, 2), torch.randn(4, 3)
        optimizer = gathering(model, 0.01, weight_decay=weight_decay)
        for _ in range(3):
            backward(model, x)
            if not weight_decay:
                for p in model.parameters():
                    p.grad += 0.5 * p.detach()
            optimizer.step()
        return model.weight.detach()

    torch.testing.assert_close(run(0.5), run(0.0))


def test_other_parameters_move_by_the_first_order_rule():
    model = nn.LayerNorm(3)
    optimizer = gathering(model, 0.1, momentum=0.5, adaptation=0.0)
    before, x = model.weight.detach().clone(), torch.randn(4, 3)
    backward(model, x)
    first = model.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * first / (first.abs() + 1e-8))
    before = model.weight.detach().clone()
    backward(model, x)
    second = model.weight.grad.clone()
    optimizer.step()
    root = torch.sqrt((0.95 * first**2 + second**2) / 1.95) + 1e-8
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * (0.5 * first + second) / 1.5 / root)


def test_vectors_that_move_together_each_follow_adams_rule():
    torch.manual_seed(0)
    precisions = (torch.float32, torch.float64, torch.float32, torch.float16)
    model = nn.ParameterList([nn.Parameter(torch.randn(3 + i).to(dtype)) for i, dtype in enumerate(precisions)])
    rates, decays = (0.1, 0.1, 0.01, 0.1), (0.5, 0.5, 0.9, 0.5)
    groups = [{"params": [model[i]], "lr": rates[i], "momentum": decays[i]} for i in range(4)]
    optimizer = SNOpt(model, param_groups=groups, adaptation=0.0)
    seen = [[] for _ in model]
    for k in range(7):
        present = [i for i in range(4) if i != k % 3]
        expected = {}
        for i in present:
            model[i].grad = torch.randn_like(model[i])
            seen[i].append(model[i].grad.to(torch.promote_types(model[i].dtype, torch.float32)))
            newest_first = [*enumerate(reversed(seen[i]))]
            momentum = sum(decays[i] ** age * g for age, g in newest_first) / sum(
                decays[i] ** age for age, _ in newest_first
            )
            squares = sum(0.95**age * g**2 for age, g in newest_first) / sum(0.95**age for age, _ in newest_first)
            expected[i] = model[i].detach() - rates[i] * momentum / (squares.sqrt() + 1e-8)
        others = {i: p.detach().clone() for i, p in enumerate(model) if i not in present}
        optimizer.step()
        optimizer.zero_grad()
        for i in present:
            torch.testing.assert_close(model[i].detach(), expected[i].to(model[i].dtype))
        assert all(torch.equal(model[i].detach(), at) for i, at in others.items())


def test_a_closure_returns_the_loss():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    optimizer = gathering(layer, 0.01)

    def closure():
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert "moments" in optimizer.state[layer.weight]


def test_groups_have_their_own_options():
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), torch.randn(4, 3)
    groups = [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[0].bias], "lr": 0.0}]
    optimizer = gathering(model, 0.01, param_groups=groups)
    before = copy.deepcopy(model)
    backward(model, x)
    optimizer.step()
    assert not torch.equal(model[0].weight, before[0].weight)
    assert torch.equal(model[0].bias, before[0].bias)
    assert torch.equal(model[1].weight, before[1].weight)
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.2})
    backward(model, x)
    optimizer.step()
    assert not torch.equal(model[1].weight, before[1].weight)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parts_of_a_layer_stay(frozen):
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    getattr(layer, frozen).requires_grad_(False)
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}
    optimizer = gathering(layer, 0.01)
    for _ in range(3):
        backward(layer, x)
        optimizer.step()
    assert torch.equal(getattr(layer, frozen), before[frozen])
    live = "bias" if frozen == "weight" else "weight"
    assert not torch.equal(getattr(layer, live), before[live])
    assert ("moments" in optimizer.state[layer.weight]) == (frozen == "bias")


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_part_frozen_on_the_way_stays(frozen):
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    optimizer = gathering(layer, 0.01)
    backward(layer, x)
    optimizer.step()
    getattr(layer, frozen).requires_grad_(False)
    before = getattr(layer, frozen).detach().clone()
    layer.zero_grad(set_to_none=True)
    for _ in range(2):
        layer(x).square().sum(1).mean().backward()
        optimizer.step()
    assert torch.equal(getattr(layer, frozen), before)


def test_a_layer_that_was_frozen_at_construction_trains_once_it_is_set_free():
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), torch.randn(4, 3)
    model[1].requires_grad_(False)
    optimizer = gathering(model, 0.01, refresh_every=1)
    backward(model, x)
    model[1].weight.grad = torch.ones(2, 2)  # left over from before
    before = copy.deepcopy(model)
    optimizer.step()
    assert torch.equal(model[1].weight, before[1].weight)
    model[1].requires_grad_(True)
    for _ in range(2):
        backward(model, x)
        optimizer.step()
    assert not torch.equal(model[1].weight, before[1].weight)
    assert "moments" in optimizer.state[model[1].weight]


def test_a_frozen_layer_inside_a_field_is_left_alone():
    model, x = Net(), torch.randn(3, 2, 5, 5)
    model.ode.field.requires_grad_(False)
    before = model.ode.field.conv.weight.clone()
    optimizer = gathering(model)
    backward(model, x)
    optimizer.step()
    assert torch.equal(model.ode.field.conv.weight, before)


def test_everywhere_false_preconditions_fields_alone():
    model = Net()
    optimizer = gathering(model, 0.01, everywhere=False)
    backward(model, torch.randn(3, 2, 5, 5))
    optimizer.step()
    preconditioned = {
        layer for layer in model.modules() if is_layer(layer) and "moments" in optimizer.state[layer.weight]
    }
    assert preconditioned == {model.ode.field.conv}
    with pytest.raises(ProblemError, match="everywhere=False met a model without a NeuralODE"):
        gathering(nn.Linear(3, 2), 0.01, everywhere=False)


def test_weights_shared_by_modules_get_the_first_order_update():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.warns(UserWarning, match=r"shared by several modules .*: '0.weight'$"):
        optimizer = gathering(model, 0.01)
    backward(model, torch.randn(4, 3))
    optimizer.step()
    assert "squares" in optimizer.state[model[0].weight]


def test_very_wide_layers_get_the_first_order_update(monkeypatch):
    for module in ("blocks", "notices"):
        monkeypatch.setattr(f"ocnopt.optim.{module}.MOST_OUTPUTS", 3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Conv1d(4, 6, 1, groups=2))
    with pytest.warns(UserWarning, match=r"more than 3 outputs, and get the first-order update: '0.weight'$"):
        gathering(model, 0.01)


def test_the_matrix_behind_a_parametrised_weight_is_preconditioned():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    optimizer = gathering(layer, 0.01)
    backward(layer, torch.randn(4, 3))
    optimizer.step()
    assert "moments" in optimizer.state[layer.parametrizations.weight.original1]


def test_a_layer_that_is_never_called_gets_the_first_order_update_and_a_warning():
    class Uncalled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)
            self.calls = False

        def forward(self, x):
            return self.inner(x) if self.calls else x @ self.inner.weight.T + self.inner.bias

    model, x = Uncalled(), torch.randn(4, 3)
    optimizer = gathering(model, 0.01, refresh_every=1)
    backward(model, x)
    with pytest.warns(UserWarning, match="layer 'inner' received a gradient without a forward pass"):
        optimizer.step()
    backward(model, x)
    optimizer.step()  # warned once
    assert "squares" in optimizer.state[model.inner.weight]
    model.calls = True
    backward(model, x)
    optimizer.step()
    assert "moments" in optimizer.state[model.inner.weight]


def test_an_empty_batch_moves_nothing_and_warns_of_nothing():
    model = Net(adjoint="continuous", method="dopri5", steps=None)
    optimizer, before = gathering(model), copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    model(torch.ones(0, 2, 5, 5)).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_watches_an_ordinary_iteration():
    model = Net()
    optimizer = gathering(model, refresh_every=100)
    watched = []
    for _ in range(12):
        watched.append(any(module._forward_hooks for module in model.modules()) and bool(model.ode._observers))
        backward(model, torch.randn(3, 2, 5, 5))
        optimizer.step()
    assert [k for k, watches in enumerate(watched) if watches] == [0, 1, 3, 5]
    assert not model._forward_pre_hooks
    assert not any(module._forward_hooks for module in model.modules())


def test_a_watched_model_can_be_copied():
    model = Net()
    optimizer = gathering(model)
    copied = copy.deepcopy(model)
    copied(torch.randn(3, 2, 5, 5)).sum().backward()
    assert not optimizer._collector.take()


def test_the_rest_beyond_the_leading_eigenvectors_moves_too(monkeypatch):
    monkeypatch.setattr("ocnopt.optim.matrices.RANK", 2)
    model = Net()
    optimizer = gathering(model, lr=0.02)
    losses = train(model, optimizer, list(zip(*data(2), strict=True)) * 20)
    assert losses[-1] < 0.3 * losses[0]
    assert optimizer.state[model.ode.field.conv.weight]["input_vectors"].shape == (1, 46, 2)
