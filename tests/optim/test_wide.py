"""SNOpt on wide layers, whose bases are leading parts on both sides: its rule against a dense one, states, copies."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from ocnopt.optim.arrangement import PADDING
from ocnopt.optim.blocks import find_blocks
from ocnopt.optim.snopt import SNOpt
from tests.optim.cases import backward

WIDEST, LEADING, BESIDE_SHORT = 4, 2, 3


@pytest.fixture(autouse=True)
def _narrow(monkeypatch, float64):
    monkeypatch.setattr("ocnopt.optim.bases.WIDEST", WIDEST)
    monkeypatch.setattr("ocnopt.optim.bases.LEADING", LEADING)
    monkeypatch.setattr("ocnopt.optim.bases.BESIDE_SHORT", BESIDE_SHORT)


def make():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2))


def completed(vectors):
    """Orthonormal columns completed to a basis of the whole space."""
    rest = torch.linalg.eigh(vectors @ vectors.mT)[1][..., : vectors.shape[-2] - vectors.shape[-1]]
    return torch.cat([vectors, rest], -1)


def shared(full, kept, dim):
    """Moments whose last entries along an axis, of directions of a rest, are replaced by their mean."""
    if kept == full.shape[dim]:
        return full
    inside, outside = full.split([kept, full.shape[dim] - kept], dim)
    return torch.cat([inside, outside.mean(dim, keepdim=True).expand_as(outside)], dim)


@pytest.mark.parametrize("shape", [(6, 5), (6, 3), (3, 6)])
@pytest.mark.parametrize("length", ["noise", "division"])
def test_steps_are_those_of_complete_bases_whose_rest_shares_its_moments(shape, length):
    (b, a), lr, damping, power = shape, 0.02, 0.1, 0.75
    layer = nn.Linear(a, b, bias=False)
    optimizer = SNOpt(layer, lr, damping=damping, power=power, adaptation=0.0, length=length, refresh_every=4)
    state, M, s, old = optimizer.state[layer.weight], None, None, None

    def newest(count, decay):
        return (1 - decay) / (1 - decay**count)

    for k in range(20):
        before, G = layer.weight.detach().clone(), torch.randn(b, a)
        layer.weight.grad = G.clone()
        optimizer.step()
        M = G if M is None else M + newest(k + 1, 0.9) * (G - M)
        UA, UB = state["input_vectors"][0], state["output_vectors"][0]
        q, r = UB.shape[1], UA.shape[1]
        if s is None:  # the oracle starts from what the optimiser started with
            QA, QB = completed(UA), completed(UB)
            moments = state["moments"][0]
            rows, columns = [*range(q), *[q] * (b - q)], [*range(r), *[r] * (a - r)]
            s = moments[rows][:, columns]
        else:
            if UA is not old[0] or UB is not old[1]:
                new = completed(UA), completed(UB)
                s = (new[1].mT @ QB).square() @ s @ (new[0].mT @ QA).square().mT
                QA, QB = new
            s = s + newest(k + 2, 0.95) * ((QB.mT @ G @ QA).square() - s)
            s = shared(shared(s, q, 0), r, 1)
        old = UA, UB
        D = QB @ (QB.mT @ M @ QA / (s + damping * s.mean()) ** power) @ QA.mT
        if length == "noise":
            D = D * M.norm() / s.mean().sqrt() / D.norm()
        torch.testing.assert_close(layer.weight.detach(), before - lr * D, rtol=1e-10, atol=1e-10)
    assert (b, a, q, r) in ((6, 5, 2, 2), (6, 3, 3, 3), (3, 6, 3, 3))


def test_both_sides_are_refreshed_in_turn():
    layer = nn.Linear(6, 7, bias=False)
    optimizer, changed, before = SNOpt(layer, 0.01, refresh_every=10), [], None
    for _ in range(12):
        backward(layer, torch.randn(9, 6))
        optimizer.step()
        state = optimizer.state[layer.weight]
        now = [state["input_vectors"].clone(), state["output_vectors"].clone()]
        changed.append([before is None or not torch.equal(*pair) for pair in zip(now, before or now, strict=True)])
        before = now
    assert [k for k, (first, _) in enumerate(changed) if first] == [0, 3, 6]
    assert [k for k, (_, second) in enumerate(changed) if second] == [0, 1, 5]


@pytest.mark.parametrize("every", [1, 4, 10])
def test_matrices_that_are_wide_on_both_sides_are_refreshed_by_their_size(every):
    layers = nn.ModuleList([nn.Linear(*sides, bias=False) for sides in ((6, 7), (8, 3), (7, 7), (3, 8))])
    optimizer, found = SNOpt(layers, 0.01, refresh_every=every), [[] for _ in layers]
    for k in range(25):
        before = [dict(optimizer.state[layer.weight]).get("basis_step", torch.zeros(())).clone() for layer in layers]
        optimizer.zero_grad()
        for layer in layers:
            layer(torch.randn(9, layer.in_features)).sin().sum().backward()
        optimizer.step()
        for layer, count, own in zip(layers, before, found, strict=True):
            own += [k] * int(optimizer.state[layer.weight]["basis_step"] - count)
    for shift, own in zip((6, 0, 7, 0), found, strict=True):
        assert own == [k for k in range(25) if k in {0, 1, 3, 5} or (k - shift) % every == 0]


def train(model, optimizer, steps, seed=0):
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss = (model(x.to(model[0].weight)) - x[:, :2].sin().to(model[0].weight)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("curvature", ["gradient", "costate", "mixed"])
def test_a_wide_net_is_trained_with_thin_states(curvature):
    model = make()
    optimizer = SNOpt(model, curvature=curvature)
    losses = train(model, optimizer, 60)
    assert losses[-1] < 0.1 * losses[0]
    state = optimizer.state[model[2].weight]
    shapes = {name: value.shape for name, value in state.items() if isinstance(value, torch.Tensor)}
    assert shapes["input_vectors"] == (1, 6, 2)
    assert shapes["output_vectors"] == (1, 7, 2)
    assert shapes["moments"] == (1, 3, 3)
    assert not shapes.keys() & {"input_factor", "output_factor"}
    first = optimizer.state[model[0].weight]  # the side that is not wide is complete, and holds the bias
    assert first["input_vectors"].shape == (1, 4, 4)
    assert first["moments"].shape == (1, 4, 4)


def test_the_bias_of_a_layer_that_is_wide_on_both_sides_moves_by_itself():
    model = make()
    optimizer = SNOpt(model)
    train(model, optimizer, 3)
    assert "squares" in optimizer.state[model[2].bias]
    assert not any("squares" in optimizer.state[model[i].bias] for i in (0, 4))
    model[2].bias.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    train(model, optimizer, 3)
    model[0].bias.requires_grad_(True)
    train(model, optimizer, 3)
    assert optimizer.state[model[0].weight]["input_vectors"].shape == (1, 4, 4)


def test_groups_of_a_wide_convolution_have_bases_of_their_own():
    torch.manual_seed(0)
    layer, x = nn.Conv1d(4, 10, 3, groups=2), torch.randn(8, 4, 9)
    optimizer, losses = SNOpt(layer, 0.02), []
    for _ in range(30):
        backward(layer, x)
        optimizer.step()
        losses.append(layer(x).square().sum().item())
    assert losses[-1] < 0.1 * losses[0]
    assert optimizer.state[layer.weight]["moments"].shape == (2, 3, 3)


def test_the_scale_of_the_loss_does_not_matter():
    ends = []
    for scale in (1.0, 2.0**20):
        model = make()
        optimizer = SNOpt(model)
        for _ in range(8):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            (scale * model(x).square().mean()).backward()
            optimizer.step()
        ends.append(model[2].weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 10, 13])
@pytest.mark.parametrize("way", ["state", "copy", "pickle"])
def test_a_run_goes_on_bit_for_bit(steps, way):
    model = make()
    optimizer = SNOpt(model)
    train(model, optimizer, steps)
    if way == "state":
        twin = make()
        twin.load_state_dict(model.state_dict())
        resumed, file = SNOpt(twin), io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
    elif way == "copy":
        twin, resumed = copy.deepcopy((model, optimizer))
    else:
        twin, resumed = pickle.loads(pickle.dumps((model, optimizer)))  # noqa: S301
    assert train(model, optimizer, 14, seed=1) == train(twin, resumed, 14, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_state_with_complete_bases_is_taken_over(monkeypatch):
    """As saved before wide layers had leading parts alone, with their biases as columns."""
    monkeypatch.setattr("ocnopt.optim.bases.WIDEST", 100)
    model = make()
    optimizer = SNOpt(model)
    train(model, optimizer, 10)
    saved = copy.deepcopy(optimizer.state_dict())
    assert optimizer.state[model[2].weight]["moments"].shape == (1, 7, 7)
    for state in saved["state"].values():
        state.pop("basis_step", None)
    monkeypatch.setattr("ocnopt.optim.bases.WIDEST", WIDEST)
    resumed = SNOpt(model)
    resumed.load_state_dict(saved)
    losses = train(model, resumed, 60)
    assert losses[-1] < losses[0]
    assert max(losses) < 5.0 * losses[0]  # over 12 seeds at most 3.6, also where both sides went over in turn
    for i, shape in ((0, (1, 4, 4)), (2, (1, 3, 3)), (4, (1, 2, 4))):
        assert resumed.state[model[i].weight]["moments"].shape == shape
    assert not resumed.state[model[2].weight].keys() & {"input_factor", "output_factor"}


def test_a_complete_basis_without_bias_is_cut_short(monkeypatch):
    monkeypatch.setattr("ocnopt.optim.bases.WIDEST", 100)
    layer, x = nn.Linear(6, 7, bias=False), torch.randn(9, 6)
    optimizer = SNOpt(layer)
    for i in range(12):
        if i == 7:
            monkeypatch.setattr("ocnopt.optim.bases.WIDEST", WIDEST)
            optimizer.load_state_dict(optimizer.state_dict())
        backward(layer, x)
        optimizer.step()
        shape = (1, 7, 6) if i < 7 else (1, 3, 3)
        assert optimizer.state[layer.weight]["moments"].shape == shape


def test_precision_may_change_between_steps():
    model = make().float()
    optimizer = SNOpt(model)
    train(model, optimizer, 5)
    model.double()
    losses = train(model, optimizer, 60)
    assert losses[-1] < losses[0]
    assert optimizer.state[model[2].weight]["momentum_left"].dtype == torch.float64
    half = make().bfloat16()
    optimizer = SNOpt(half)
    train(half, optimizer, 12)
    assert optimizer.state[half[2].weight]["change"].dtype == torch.float32


@pytest.mark.parametrize("curvature", ["gradient", "costate"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_parts_of_the_momentum_are_kept_where_they_follow_those_of_the_gradient(curvature, has_bias, monkeypatch):
    monkeypatch.setattr("ocnopt.optim.matrices.RANK", 3)  # a rest beside a bias too
    layer = nn.Linear(3 if has_bias else 5, 6, bias=has_bias)
    optimizer, is_kept = SNOpt(layer, 0.01, curvature=curvature), False
    for i in range(9):
        backward(layer, torch.randn(9, layer.in_features))
        if has_bias:
            layer.bias.requires_grad_(i > 2)
            layer.bias.grad = None if i == 6 else layer.bias.grad
        optimizer.step()
        state = optimizer.state[layer.weight]
        (block,) = find_blocks(layer, dict.fromkeys(layer.parameters(), ""))
        if "momentum_core" in state:
            is_kept = True
            momentum = block.matrix({p: optimizer.state[p]["momentum"] for p in block.parameters})
            UA, UB = state["input_vectors"], state["output_vectors"]
            expected = {"left": UB.mT @ momentum, "core": UB.mT @ momentum @ UA, "right": momentum @ UA}
            for name in {key.removeprefix("momentum_") for key in state} & expected.keys():
                torch.testing.assert_close(state[f"momentum_{name}"], expected[name], rtol=1e-12, atol=1e-12)
            assert ("momentum_left" in state and "momentum_right" in state) == (not has_bias)
    assert is_kept == (curvature == "gradient")


SHAPES = {
    "of one size": [(7, 6), (6, 3), (7, 6), (3, 6), (6, 7), (3, 6), (7, 6)],
    "padded": [(3, 6), (9, 3), (3, 7), (3, 9), (4, 11), (2, 8)],
}


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_matrices_of_one_stack_move_as_each_by_itself(skips, kind):
    torch.manual_seed(0)
    shapes = SHAPES[kind]
    together = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
    apart = [nn.ParameterList([nn.Parameter(p.detach().clone())]) for p in together]
    one = SNOpt(together, adaptation=0.0, refresh_every=4)
    others = [SNOpt(each, adaptation=0.0, refresh_every=4) for each in apart]
    for i in range(30):
        for j, (p, each) in enumerate(zip(together, apart, strict=True)):
            p.grad = None if skips and (i + j) % 5 == 0 else torch.randn_like(p)
            each[0].grad = None if p.grad is None else p.grad.clone()
        for optimizer in (one, *others):
            optimizer.step()
        assert len(one._stacks._stacks) == 3
        for p, each in zip(together, apart, strict=True):
            torch.testing.assert_close(p, each[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (3, 8), (8, 3)])
def test_steps_are_shorter_where_both_sides_are_hidden(shape, monkeypatch):
    ends = []
    for hidden in (100, 4):
        monkeypatch.setattr("ocnopt.optim.blocks.HIDDEN", hidden)
        torch.manual_seed(0)
        layer = nn.Linear(*shape, bias=False)
        optimizer, start = SNOpt(layer, 0.01), layer.weight.detach().clone()
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()
        ends.append(layer.weight.detach() - start)
    torch.testing.assert_close(ends[1], ends[0] * min(1.0, 4 / min(shape)), rtol=1e-10, atol=0.0)
    assert ends[0].norm() == pytest.approx(0.01 * ends[0].numel() ** 0.5)


def test_groups_with_long_rows_may_be_padded(monkeypatch):
    torch.manual_seed(0)
    groups, layer = nn.Conv1d(10, 6, 1, groups=2), nn.Linear(8, 3)
    models = [nn.ModuleList([groups, layer]), copy.deepcopy(nn.ModuleList([groups, layer]))]
    optimizers = [SNOpt(model, everywhere=True, refresh_every=4) for model in models]
    for _ in range(20):
        gradients = [torch.randn_like(p) for p in models[0].parameters()]
        for model, optimizer, padding in zip(models, optimizers, (PADDING, -1), strict=True):
            monkeypatch.setattr("ocnopt.optim.arrangement.PADDING", padding)
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
    assert [len(optimizer._stacks._stacks) for optimizer in optimizers] == [1, 2]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_wide_side_beside_very_few_inputs_has_all_its_vectors_at_once(groups, monkeypatch):
    monkeypatch.setattr("ocnopt.optim.bases.BESIDE_SHORT", 5)
    torch.manual_seed(0)
    layer = nn.Conv1d(2 * groups, 9 * groups, 1, groups=groups, bias=False)
    optimizer = SNOpt(layer, everywhere=True)
    for _ in range(5):
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()
        state = optimizer.state[layer.weight]
        assert "squares" not in state  # no step by Adam's rule
        vectors = state["output_vectors"]
        assert vectors.shape == (groups, 9, 5)
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(5).expand(groups, 5, 5), rtol=0, atol=1e-12)
        outside = layer.weight.grad.view(groups, 9, 2)
        outside = outside - vectors @ (vectors.mT @ outside)
        assert outside.norm() < 1e-10 or int(state["step"]) > 1
