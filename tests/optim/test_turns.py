"""Parts of a model that train in turn, as if each had an optimiser of its own, and steps without gradients."""

import copy
import io

import pytest
import torch
from torch import nn

import ocnopt as oc
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.optim.lengths import TURNS, Guards
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


SCHEDULES = {"in turn": [0, 1] * 16, "rarely": [0, 0, 0, 1] * 6, "late": [0] * 7 + [1] * 13 + [0] * 6}


@pytest.mark.parametrize(
    ("turns", "curvature"),
    # a basis of samples begins by the number of all steps, so that one that comes late is another
    [
        *((turns, "gradient") for turns in SCHEDULES),
        *((t, c) for t in ("in turn", "rarely") for c in ("costate", "mixed")),
    ],
)
def test_parts_that_train_in_turn_equal_parts_with_optimisers_of_their_own(turns, curvature):
    together, apart = parts(), parts()
    one = SNOpt(together, curvature=curvature, refresh_every=4)
    own = [SNOpt(model, curvature=curvature, refresh_every=4) for model in apart]
    train_in_turn(together, [one, one], SCHEDULES[turns])
    train_in_turn(apart, own, SCHEDULES[turns])
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


def test_what_is_taken_back_is_the_last_step_of_the_part_whose_gradient_is_large():
    model = parts()
    optimizer = SNOpt(model)
    train_in_turn(model, [optimizer] * 2, [0, 1] * 5)
    before = copy.deepcopy(model[0].state_dict())
    train_in_turn(model, [optimizer] * 2, [0, 1], 10)
    after, factors = copy.deepcopy(model[1].state_dict()), optimizer.factors
    for p in model[0].parameters():
        p.grad = 1e6 * optimizer.state[p]["change"]  # uphill along its last change
    for p in model[1].parameters():
        p.grad = None
    with pytest.warns(UserWarning, match="was taken back"):
        optimizer.step()
    for key, value in model[0].state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0.0, atol=1e-15)
    assert all(torch.equal(value, after[key]) for key, value in model[1].state_dict().items())
    for name, factor in optimizer.factors.items():
        assert factor == (max(0.01, factors[name] / 4) if name.startswith("0") else factors[name])
    assert not any("change" in optimizer.state[p] for p in model[0].parameters())
    assert all("change" in optimizer.state[p] for p in model[1].parameters())


def steps_in_turn(model, optimizer, turns):
    """Each turn is a function of the model whose loss it gives."""
    for turn in turns:
        optimizer.zero_grad()
        turn(model).backward()
        optimizer.step()


def test_what_is_usual_of_a_shared_trunk_is_so_for_each_of_its_heads():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
    model, x = nn.ModuleDict({"trunk": trunk, "a": nn.Linear(32, 6), "b": nn.Linear(32, 6)}), torch.randn(64, 6)
    optimizer = SNOpt(model)

    def loss(head, target):
        return lambda model: (model[head](model["trunk"](x)) - target).square().mean()

    turns = [*[loss("a", torch.sin(2 * x))] * 29, loss("b", 50 * torch.cos(x))]  # taken back would warn
    steps_in_turn(model, optimizer, turns * 6)
    assert min(optimizer.factors.values()) > 0.05


def test_a_neural_ode_that_joins_late_is_no_explosion():
    torch.manual_seed(0)
    odes = [NeuralODE(Field(4), 8.0, rtol=tolerance, atol=tolerance) for tolerance in (1e-1, 1e-7)]
    model, x = nn.ModuleList([nn.Linear(4, 4), *odes]), torch.randn(16, 4)
    optimizer = SNOpt(model)
    turns = [lambda model, part=part: (model[part](x) - 2 * x).square().mean() for part in range(3)]
    steps_in_turn(model, optimizer, [turns[0]] * 9 + [turns[1]] * 9 + [turns[2]] * 3)
    assert model[2].read_most_evaluations() > 3 * model[1].read_most_evaluations() > 0


def test_evaluations_of_what_is_absent_are_no_part_of_a_step():
    x = torch.randn(16, 4)
    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.ModuleList([nn.Linear(4, 4), NeuralODE(Field(4))]))
        optimizers.append(SNOpt(models[-1]))
    turns = [lambda model, part=part: (model[part](x) - 2 * x).square().mean() for part in (0, 1)]
    steps_in_turn(models[0], optimizers[0], [turns[1], *[turns[0]] * 6])
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        steps_in_turn(model, optimizer, [*[turns[0]] * 60, *[turns[1]] * 3])
    assert same(*models)
    assert same_state(*optimizers)


def test_sets_of_parameters_that_were_not_seen_for_long_are_forgotten():
    guards = Guards()
    first = guards.of([True, False])
    for i in range(1, TURNS):
        guards.of([False, *map(bool, range(i))])
        assert guards.of([True, False]) is first
    for i in range(TURNS):
        guards.of([False] * (i + 2))
    assert guards.of([True, False]) is not first
    assert len(guards.state()["turns"]) == TURNS


def test_without_adaptation_factors_return_from_a_step_that_was_taken_back():
    layer = nn.Linear(3, 2)
    optimizer = SNOpt(layer, adaptation=0.0)
    for i in range(80):
        for p in layer.parameters():
            p.grad = 1e6 * optimizer.state[p]["change"] if i == 10 else torch.ones_like(p)
        if i == 10:
            with pytest.warns(UserWarning, match="was taken back"):
                optimizer.step()
            assert optimizer.factors == {"weight": 0.25, "bias": 0.25}
        else:
            optimizer.step()
    assert optimizer.factors == pytest.approx(dict.fromkeys(("weight", "bias"), 0.25 ** (0.97**69)))


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
