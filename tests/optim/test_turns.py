"""Parts of a model that train in turn, as if each had an optimiser of its own, and steps without gradients."""

import copy
import io

import pytest
import torch
from torch import nn

import ocnopt as oc
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.optim.lengths import Guard
from ocnopt.optim.snopt import SNOpt

CURVATURES = ("gradient", "costate", "mixed")


class Field(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh(), nn.Linear(width, width, bias=False))

    def forward(self, t, x):
        return self.net(x)


def part(width):
    """Layers that share stacks with those of the other part, vectors, layers wide on one side and on both.

    Already the first gradient has the rank that their eigenbases have: rounding would choose the other directions.
    """
    return nn.Sequential(
        nn.Linear(width - 1, width),
        NeuralODE(Field(width), method="rk4", steps=2),
        nn.LayerNorm(width),
        nn.Linear(width, 170),
        nn.Tanh(),
        nn.Linear(170, 165),
        nn.Tanh(),
        nn.Linear(165, 36),
    )


def parts():
    torch.manual_seed(0)
    return nn.ModuleList([part(34), part(36)]).double()


def backward(model, i):
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(60, model[0].in_features, generator=generator, dtype=torch.float64)
    (model(x) - torch.sin(x[:, :1] * torch.arange(36))).square().mean().backward()


def train_in_turn(models, optimizers, turns, start=0):
    """Each turn is the number of the model that trains."""
    for i, k in enumerate(turns, start):
        optimizers[k].zero_grad()
        backward(models[k], i)
        optimizers[k].step()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def same_state(one, other):
    """Whether two optimisers would go on alike."""
    first, second = (optimizer.state_dict() for optimizer in (one, other))
    pairs = [(entry, second["state"][index]) for index, entry in first.pop("state").items()]
    values = [(a[key], b[key]) for a, b in pairs for key in a]
    second.pop("state")
    return (
        first == second
        and all(a.keys() == b.keys() for a, b in pairs)
        and all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in values)
    )


TURNS = {"in turn": [0, 1] * 16, "rarely": [0, 0, 0, 1] * 6, "late": [0] * 7 + [1] * 13 + [0] * 6}


@pytest.mark.parametrize(
    ("turns", "curvature"),
    # a basis of samples begins by the number of all steps, so that one that comes late is another
    [*((turns, "gradient") for turns in TURNS), *((t, c) for t in ("in turn", "rarely") for c in ("costate", "mixed"))],
)
def test_parts_that_train_in_turn_equal_parts_with_optimisers_of_their_own(turns, curvature, monkeypatch):
    for name, value in (("jump", 1.0), ("decline", 1.0), ("judge", None)):  # these are of all gradients together
        monkeypatch.setattr(Guard, name, lambda *_, value=value: value)
    together, apart = parts(), parts()
    one = SNOpt(together, curvature=curvature, refresh_every=4)
    own = [SNOpt(model, curvature=curvature, refresh_every=4) for model in apart]
    train_in_turn(together, [one, one], TURNS[turns])
    train_in_turn(apart, own, TURNS[turns])
    factors = {f"{k}.{name}": factor for k in (0, 1) for name, factor in own[k].factors.items()}
    assert one.factors == pytest.approx(factors, rel=1e-9)
    assert all(factor != 1.0 for factor in factors.values())
    for p, q in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("stop", range(1, 9))
def test_parts_that_train_in_turn_go_on_bit_for_bit(stop, curvature):
    turns, model = [0, 1, 1] * 5, parts()
    one = SNOpt(model, curvature=curvature, refresh_every=4)
    train_in_turn(model, [one, one], turns[:stop])
    copied, copied_optimizer = copy.deepcopy((model, one))
    file = io.BytesIO()
    torch.save((model.state_dict(), one.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    loaded = parts()
    loaded.load_state_dict(weights)
    other = SNOpt(loaded)
    other.load_state_dict(state)
    for each, optimizer in ((model, one), (copied, copied_optimizer), (loaded, other)):
        train_in_turn(each, [optimizer] * 2, turns[stop:], stop)
    assert same(model, copied)
    assert same(model, loaded)


@pytest.mark.parametrize("curvature", [*CURVATURES, "sampled"])
@pytest.mark.parametrize("at", [0, 1, 2, 4, 5])
def test_a_step_without_gradients_leaves_no_trace(at, curvature):
    one, other = parts()[0], parts()[0]
    optimizers = [SNOpt(model, curvature=curvature, refresh_every=4) for model in (one, other)]
    for i in range(8):
        if i == at:
            optimizers[0].zero_grad()
            one[7].bias.requires_grad_(False)
            assert optimizers[0].step(lambda: 3.0) == 3.0
            one[7].bias.requires_grad_(True)
        for model, optimizer in zip((one, other), optimizers, strict=True):
            if curvature == "sampled":
                torch.manual_seed(i)
                optimizer.sample(model(torch.randn(60, 33, dtype=torch.float64)), "gaussian")
        for model, optimizer in zip((one, other), optimizers, strict=True):
            train_in_turn([model], [optimizer], [0], i)
    assert same(one, other)
    assert same_state(*optimizers)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("keys", [["0.weight", "0.bias"], ["5.bias"], ["1.field.net.0.weight", "2.weight"]])
@pytest.mark.parametrize("frees", [False, True])
def test_what_is_copied_or_loaded_behind_a_change_of_what_is_frozen_goes_on_bit_for_bit(curvature, keys, frees):
    one, other = parts()[0], parts()[0]
    for key in keys:
        one.get_parameter(key).requires_grad_(not frees)
    optimizer = SNOpt(one, curvature=curvature, refresh_every=4)
    train_in_turn([one], [optimizer], [0] * 7)
    for key in keys:
        one.get_parameter(key).requires_grad_(frees)
    copied, copied_optimizer = copy.deepcopy((one, optimizer))
    other.load_state_dict(one.state_dict())
    for p, q in zip(other.parameters(), one.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
    loaded = SNOpt(other)
    loaded.load_state_dict(optimizer.state_dict())
    pairs = [(one, optimizer), (copied, copied_optimizer), (other, loaded)]
    for model, each in pairs:
        assert all(model.get_parameter(key).requires_grad is frees for key in keys)
        train_in_turn([model], [each], [0] * 6, 7)
    assert same(one, copied)
    assert same(one, other)
    assert same_state(optimizer, loaded)
    assert same_state(optimizer, copied_optimizer)


def test_only_what_the_last_step_moved_is_taken_back():
    model = parts()
    optimizer = SNOpt(model, adaptation=0.0)
    train_in_turn(model, [optimizer] * 2, [0, 1] * 5)
    before = copy.deepcopy(model.state_dict())
    train_in_turn(model, [optimizer] * 2, [0, 1], 10)
    between = copy.deepcopy(model[0].state_dict())
    for p in model.parameters():
        p.grad = 1e6 * optimizer.state[p]["change"]  # uphill along the last changes of both parts
    with pytest.warns(UserWarning, match="was taken back"):
        optimizer.step()
    for key, value in model[0].state_dict().items():
        assert torch.equal(value, between[key])
        assert not torch.equal(value, before[f"0.{key}"])
    for key, value in model[1].state_dict().items():
        torch.testing.assert_close(value, before[f"1.{key}"], rtol=0.0, atol=1e-15)
    assert all("change" in optimizer.state[p] for p in model[0].parameters())
    assert not any("change" in optimizer.state[p] for p in model[1].parameters())


def test_a_state_from_before_parts_trained_in_turn_goes_on():
    one, other = parts()[0], parts()[0]
    optimizer = SNOpt(one)
    train_in_turn([one], [optimizer], [0] * 7)
    state = optimizer.state_dict()
    for entry in state["state"].values():
        assert entry.pop("changed_at") == 6
    other.load_state_dict(one.state_dict())
    loaded = SNOpt(other)
    loaded.load_state_dict(state)
    assert same_state(optimizer, loaded)


def test_a_factor_goes_on_from_where_its_parameters_moved_last_together():
    layer = nn.Linear(3, 2)
    optimizer = SNOpt(layer)
    for i in range(12):
        layer.weight.grad = torch.full((2, 3), (-1.0) ** i)
        layer.bias.grad = torch.ones(2) if i in (0, 11) else None
        before = optimizer.factors["weight"]
        change = optimizer.state[layer.weight]["change"].clone() if i == 11 else None
        optimizer.step()
    # of the weight alone: the bias last moved ten steps ago
    cosine = float(torch.nn.functional.cosine_similarity(layer.weight.grad.flatten(), change.flatten(), 0))
    assert cosine == pytest.approx(1.0)
    assert optimizer.factors["bias"] == optimizer.factors["weight"]
    assert optimizer.factors["weight"] <= before


def test_sample_is_asked_for_where_a_part_that_trains_needs_it():
    model = parts()
    optimizer = SNOpt(model, curvature="sampled")
    backward(model[0], 0)
    with pytest.raises(oc.ProblemError, match=r"met a step without sample\(\)"):
        optimizer.step()
    optimizer.zero_grad()
    assert optimizer.step() is None
    for i in range(3):  # the second gradient of a part needs samples, the third does not
        optimizer.zero_grad()
        if i < 2:
            optimizer.sample(model[0](torch.randn(9, 33, dtype=torch.float64)), "gaussian")
        backward(model[0], i)
        optimizer.step()
    assert "moments" in optimizer.state[model[0][0].weight]
