"""Kronecker factors against explicit patches, per-sample gradients, a fine-grid integral and dense linear algebra."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from ocnopt.differential.kronecker import (
    Basis,
    Collector,
    Eigen,
    Samples,
    as_matrix,
    carried_moments,
    eigenbasis,
    first_moments,
    gradient_samples,
    input_samples,
    is_layer,
)
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import Horizon

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Field(nn.Module):
    """A tanh network that sees the time."""

    def __init__(self, n=2, hidden=3):
        super().__init__()
        self.first = nn.Linear(n + 1, hidden)
        self.second = nn.Linear(hidden, n, bias=False)

    def forward(self, t, x):
        return self.second(torch.tanh(self.first(torch.cat([x, t.expand(len(x), 1)], 1))))


def gather(model, run, *, mean=True):
    """The samples of every layer of a model during ``run()``."""
    layers = {module: module.bias is not None for module in model.modules() if is_layer(module)}
    odes = [module for module in model.modules() if isinstance(module, NeuralODE)]
    collector = Collector(model, layers, {module for ode in odes for module in ode.field.modules()}, mean=mean)
    handles = [*collector.attach(), *(ode.observe(collector) for ode in odes)]
    run()
    for handle in handles:
        handle.remove()
    return collector.take()


@st.composite
def convolutions(draw):
    """A convolution of any kind and an input that it takes."""
    kind = draw(st.sampled_from(CONVOLUTIONS))
    spatial = CONVOLUTIONS.index(kind) + 1
    axes = st.tuples(*[st.integers(1, 3)] * spatial)
    groups, kernel = draw(st.integers(1, 2)), draw(axes)
    stride, dilation = draw(axes), draw(st.tuples(*[st.integers(1, 2)] * spatial))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(*[st.integers(0, 2)] * spatial)))
    if padding == "same":
        stride = 1
    layer = kind(
        2 * groups,
        3 * groups,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        mode,
        dtype=torch.float64,
    )
    sizes = [draw(st.integers(5, 7)) for _ in range(spatial)]
    return layer, torch.randn(draw(st.integers(1, 3)), 2 * groups, *sizes)


@given(convolutions())
def test_inputs_of_a_convolution_are_the_mean_of_its_patches(case):
    layer, x = case
    samples = input_samples(layer, x, bias=layer.bias is not None)
    for i in range(len(x)):
        outputs = layer(x[i : i + 1]).flatten(2).mean(2)[0]
        rows = as_matrix(layer, *_sum_of_gradients(outputs, layer)).sum(1) / (layer.out_channels // layer.groups)
        torch.testing.assert_close(samples[:, i], rows)


def _sum_of_gradients(outputs, layer):
    """The derivative of the outputs' mean over places by the parameters is the mean patch, and 1 for the bias."""
    parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    gradients = torch.autograd.grad(outputs.sum(), parameters)
    return (*gradients, None) if layer.bias is None else gradients


def test_inputs_of_a_convolution_match_unfold():
    layer = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False)
    x = torch.randn(5, 3, 6, 7)
    patches = functional.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 2), stride=(2, 1))
    torch.testing.assert_close(input_samples(layer, x, bias=False)[0], patches.mean(2))


@given(convolutions())
def test_factors_of_every_convolution_are_positive_semi_definite(case):
    layer, x = case
    model = nn.Sequential(layer)
    (samples,) = gather(model, lambda: model(x).square().mean().backward()).values()
    for factor in samples.factors():
        values = torch.linalg.eigvalsh(factor)
        assert values.min() >= -1e-12 * values.max().clamp(min=1.0)
    assert samples.inputs.shape == (layer.groups, len(x), as_matrix(layer, layer.weight, layer.bias).shape[2])


@given(convolutions())
def test_gradients_of_a_convolution_are_summed_over_places(case):
    layer, x = case
    g = torch.randn_like(layer(x))
    sums = g.reshape(len(x), layer.groups, layer.out_channels // layer.groups, -1).sum(3)
    torch.testing.assert_close(gradient_samples(layer, g), sums.transpose(0, 1))


@pytest.mark.parametrize("method", ["dopri5", "rk4", "bosh3", "heun"])
@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_factors_are_positive_semi_definite_for_every_tableau(method, adjoint):
    ode = NeuralODE(Field(), method=method, adjoint=adjoint, steps=3)
    taken = gather(ode, lambda: ode(torch.randn(2, 2)).square().mean().backward())
    assert len(taken) == 2
    for samples in taken.values():
        for factor in samples.factors():
            assert torch.linalg.eigvalsh(factor).min() >= -1e-14


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
@pytest.mark.parametrize("horizon", [Horizon(0.0, 1.5), Horizon(1.0, -0.5)])
def test_factors_against_a_fine_grid(adjoint, horizon):
    field, x = Field(), torch.randn(4, 2)
    ode = NeuralODE(field, horizon, rtol=1e-5, atol=1e-5, adjoint=adjoint)
    taken = gather(ode, lambda: ode(x).square().sum(1).mean().backward())
    for layer, (inputs, gradients) in _fine_grid(field, x, horizon).items():
        for factor, reference in zip(
            taken[layer].factors(), Samples(inputs[None], gradients[None]).factors(), strict=True
        ):
            assert torch.linalg.matrix_norm(factor - reference) <= 1e-3 * torch.linalg.matrix_norm(reference)


def _fine_grid(field, x, horizon, steps=400):
    """Time means of inputs and time integrals of per-sample gradients at the outputs, by midpoint sums."""
    h = (horizon.t1 - horizon.t0) / steps
    states = [x.requires_grad_()]
    for k in range(steps):
        t = torch.tensor(horizon.t0 + (k + 0.5) * h)
        middle = states[-1] + h / 2 * field(t - h / 2, states[-1])
        states.append(states[-1] + h * field(t, middle))
    costates = torch.autograd.grad(states[-1].square().sum(), states)  # of the sum: one sample's own loss
    sums = {field.first: [0.0, 0.0], field.second: [0.0, 0.0]}
    for k in range(steps):
        t = torch.tensor(horizon.t0 + (k + 0.5) * h)
        y, a = (states[k] + states[k + 1]).detach() / 2, (costates[k] + costates[k + 1]) / 2
        z = torch.cat([y, t.expand(len(y), 1)], 1)
        hidden = torch.tanh(field.first(z)).detach()
        g = (a @ field.second.weight.detach()) * (1 - hidden**2)
        ones = torch.ones(len(y), 1)
        for layer, (i, o) in {field.first: (torch.cat([z, ones], 1), g), field.second: (hidden, a)}.items():
            sums[layer][0] += i / steps
            sums[layer][1] += o * h
    return sums


class Gated(nn.Module):
    """A field whose layer has an input that does not change with time."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs, self.layer = inputs, nn.Linear(inputs.shape[1], 2)

    def forward(self, t, x):
        return torch.tanh(self.layer(self.inputs)) * x * torch.cos(t)


@pytest.mark.parametrize("solves", [1, 3])
@pytest.mark.parametrize(("adjoint", "rtol"), [("discrete", 1e-12), ("continuous", 1e-3)])
def test_products_are_per_sample_gradients_where_the_input_is_constant_in_time(solves, adjoint, rtol):
    field, x = Gated(torch.randn(4, 3)), torch.randn(4, 2)
    ode = NeuralODE(field, rtol=1e-6, atol=1e-6, adjoint=adjoint)

    def losses():
        y = x
        for _ in range(solves):
            y = ode(y)
        return y.square().sum(1)

    (samples,) = gather(ode, lambda: losses().mean().backward()).values()
    for i in range(4):
        field.zero_grad()
        losses()[i].backward()
        product = samples.gradients[0, i, :, None] * samples.inputs[0, i]
        expected = as_matrix(field.layer, field.layer.weight.grad, field.layer.bias.grad)[0]
        torch.testing.assert_close(product, expected, rtol=rtol, atol=rtol)


def test_a_linear_layer_meets_samples_at_several_places():
    layer, x = nn.Linear(3, 2), torch.randn(4, 5, 3)
    (samples,) = gather(layer, lambda: layer(x).square().sum().backward(), mean=False).values()
    torch.testing.assert_close(samples.inputs[0, :, :3], x.mean(1))
    torch.testing.assert_close(samples.gradients[0], 2 * layer(x).sum(1))


@pytest.mark.parametrize(
    ("layer", "x"), [(nn.Linear(3, 2), torch.randn(3)), (nn.Conv2d(2, 3, 3), torch.randn(2, 4, 5))], ids=str
)
def test_one_sample_without_a_batch_axis(layer, x):
    layer, x = layer.double(), x.double()
    (alone,) = gather(layer, lambda: layer(x).sum().backward()).values()
    (batch,) = gather(layer, lambda: layer(input=x[None]).sum().backward()).values()
    torch.testing.assert_close(alone, batch)


def test_the_mean_over_a_batch_is_undone():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    (mean,) = gather(layer, lambda: layer(x).square().sum(1).mean().backward()).values()
    (total,) = gather(layer, lambda: layer(x).square().sum(1).sum().backward(), mean=False).values()
    torch.testing.assert_close(mean, total)


def test_a_forward_pass_without_a_backward_pass_leaves_no_trace():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)

    def run():
        layer(torch.randn(7, 3))
        with torch.no_grad():
            layer(torch.randn(4, 3))
        layer(x).sum().backward()

    (samples,) = gather(layer, run).values()
    torch.testing.assert_close(samples.inputs[0, :, :3], x)


def test_accumulated_gradients_are_of_other_samples():
    layer, x = nn.Linear(3, 2), torch.randn(6, 3)

    def run():
        for part in x.split([2, 2, 1, 1]):
            layer(part).sum().backward()

    (samples,) = gather(layer, run).values()
    torch.testing.assert_close(samples.inputs[0, :, :3], x)


def test_uses_by_the_same_samples_add_up_and_other_sizes_count_apart():
    inner = nn.Linear(3, 3, bias=False)
    model, x = nn.Sequential(inner, inner), torch.randn(2, 3)
    (samples,) = gather(model, lambda: model(x).sum().backward(), mean=False).values()
    torch.testing.assert_close(samples.inputs[0], (x + inner(x)) / 2)
    (samples,) = gather(inner, lambda: (inner(x).sum() + inner(x[:1]).sum()).backward()).values()
    assert samples.inputs.shape == (1, 3, 3)


def test_samples_with_nan_are_left_out():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    x[1, 2] = torch.nan
    (samples,) = gather(layer, lambda: layer(x).sum().backward()).values()
    torch.testing.assert_close(samples.inputs[0, :, :3], x[[0, 2, 3]])
    assert not gather(layer, lambda: layer(x[1:2]).sum().backward())


def test_layers_of_a_field_count_in_stages_alone():
    ode = NeuralODE(Field(), method="rk4", steps=1)
    assert not gather(ode, lambda: ode.field(torch.tensor(0.5), torch.randn(2, 2)).sum().backward())


def test_other_inputs_than_the_type_takes_are_not_read():
    class Scaled(nn.Linear):
        def forward(self, scale, x):
            return scale * super().forward(x)

    class Pair(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y, y

    scaled, pair = Scaled(3, 2), Pair(3, 2)
    assert not gather(scaled, lambda: scaled(torch.tensor(2.0), torch.randn(4, 3)).sum().backward())
    assert not gather(pair, lambda: pair(torch.randn(4, 3))[0].sum().backward())
    layer = nn.Linear(3, 2)
    assert not gather(layer, lambda: layer(torch.randn(0, 3)).sum().backward())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_of_a_watched_model_is_not_watched(duplicate):
    model = nn.Sequential(nn.Linear(3, 2))
    copies = []

    def run():
        copies.append(duplicate(model))
        copies[0](torch.randn(4, 3)).sum().backward()

    assert not gather(model, run)


def random_basis(a=4, b=3, n=6, rank=4, groups=2):
    """Samples and the basis of their factors."""
    samples = Samples(torch.randn(groups, n, a), torch.randn(groups, n, b))
    return samples, eigenbasis(samples, rank)


def test_power_one_in_the_exact_basis_is_kfac():
    samples, basis = random_basis()
    A, B = samples.factors()
    G = torch.randn(2, 3, 4)
    spectrum = basis.spectrum() * _trace(A) * _trace(B)
    step = basis.precondition(*basis.turn(G), spectrum, damping=0.0, power=1.0)
    torch.testing.assert_close(step, torch.linalg.solve(B, G) @ torch.linalg.inv(A))
    for group in range(2):
        vec = G[group].mT.reshape(-1)  # columns stacked
        solved = torch.linalg.solve(torch.kron(A[group].contiguous(), B[group].contiguous()), vec)
        torch.testing.assert_close(step[group].mT.reshape(-1), solved)


def _trace(matrix):
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def test_least_squares_in_one_step():
    layer, z, y = nn.Linear(3, 2), torch.randn(9, 3), torch.randn(9, 2)
    (samples,) = gather(layer, lambda: ((layer(z) - y).square().sum(1) / 2).mean().backward()).values()
    A, _ = samples.factors()  # the exact Hessian is A (X) I
    basis = eigenbasis(Samples(samples.inputs, torch.eye(2)[None]), rank=4)
    G = as_matrix(layer, layer.weight.grad, layer.bias.grad)
    moments = basis.spectrum() * _trace(A) * 2
    W = as_matrix(layer, layer.weight, layer.bias).detach() - basis.precondition(*basis.turn(G), moments, 0.0, 1.0)
    solution = torch.linalg.lstsq(functional.pad(z, (0, 1), value=1.0), y).solution
    torch.testing.assert_close(W[0], solution.mT)


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_precondition_against_dense_matrices(rank, power):
    _, basis = random_basis(rank=rank)
    M, moments = torch.randn(2, 3, 4), torch.rand(2, 3, rank + 1)
    step = basis.precondition(*basis.turn(M), moments, damping=0.1, power=power)
    full = torch.cat([moments[..., :rank], *[moments[..., rank:]] * (4 - rank)], -1)
    UA = _completed(basis.input.vectors)
    scaled = (basis.output.vectors.mT @ M @ UA) / (full + 0.1 * full.mean()) ** power
    torch.testing.assert_close(step, basis.output.vectors @ scaled @ UA.mT)


def _completed(vectors):
    """Orthonormal columns completed to a basis of the whole space."""
    rest = torch.linalg.eigh(vectors @ vectors.mT)[1][..., : vectors.shape[-2] - vectors.shape[-1]]
    return torch.cat([vectors, rest], -1)


def test_squares_and_spectrum_keep_their_sums():
    samples, basis = random_basis(rank=2)
    G = torch.randn(2, 3, 4)
    weights = torch.tensor([1.0, 1.0, 2.0])  # the rest has two directions
    torch.testing.assert_close((basis.squares(*basis.turn(G)) * weights).sum((1, 2)), G.square().sum((1, 2)))
    torch.testing.assert_close((basis.spectrum() * weights).sum((1, 2)), torch.ones(2))
    torch.testing.assert_close((first_moments(basis, G) * weights).sum((1, 2)), G.square().sum((1, 2)))
    torch.testing.assert_close(basis.mean(basis.spectrum()), torch.tensor(1 / 12))
    assert len(samples) == 2


@pytest.mark.parametrize(("n", "rank"), [(2, 3), (6, 4), (6, 3), (1, 2)])
def test_leading_eigenvectors_of_averaged_factors(n, rank):
    first, old = random_basis(a=5, rank=5)
    samples = Samples(torch.randn(2, n, 5), torch.randn(2, n, 3))
    new = eigenbasis(samples, rank, old, keep=0.3)
    (A0, B0), (A1, B1) = first.factors(), samples.factors()
    for eigen, before, after in ((new.input, A0, A1), (new.output, B0, B1)):
        average = 0.3 * before / _trace(before) + 0.7 * after / _trace(after)
        values = torch.linalg.eigvalsh(average).flip(-1)[..., : eigen.values.shape[-1]]
        torch.testing.assert_close(eigen.values, values)
        torch.testing.assert_close(average @ eigen.vectors, eigen.vectors * eigen.values[..., None, :])
    assert new.input.vectors.shape == (2, 5, rank)


def test_few_samples_give_an_orthonormal_basis_of_their_span():
    samples = Samples(torch.randn(1, 2, 6), torch.randn(1, 2, 3))
    basis = eigenbasis(samples, rank=4)
    U = basis.input.vectors
    assert U.shape == (1, 6, 2)
    torch.testing.assert_close(U.mT @ U, torch.eye(2)[None])
    torch.testing.assert_close(samples.inputs @ U @ U.mT, samples.inputs)
    torch.testing.assert_close(basis.output.vectors.mT @ basis.output.vectors, torch.eye(3)[None])


def test_a_dead_layer_has_a_basis():
    basis = eigenbasis(Samples(torch.zeros(1, 4, 3), torch.zeros(1, 4, 2)), rank=8)
    moments = first_moments(basis, torch.zeros(1, 2, 3))
    step = basis.precondition(*basis.turn(torch.zeros(1, 2, 3)), moments, 0.0, 0.5)
    torch.testing.assert_close(step, torch.zeros(1, 2, 3))


@pytest.mark.parametrize(("before", "after"), [(4, 4), (2, 3), (3, 2), (4, 2), (2, 4)])
def test_moments_move_with_the_basis(before, after):
    _, old = random_basis(rank=before)
    _, new = random_basis(rank=after)
    moments = torch.rand(2, 3, before + 1)
    if before == 4:
        moments[..., -1] = 0.0
    moved = carried_moments(moments, old, new)
    full = torch.cat([moments[..., :before], *[moments[..., before:]] * (4 - before)], -1)
    RA = new.input.vectors.mT @ _completed(old.input.vectors)
    RB = new.output.vectors.mT @ old.output.vectors
    expected = RB.square() @ full @ RA.square().mT
    torch.testing.assert_close(moved[..., :after], expected)
    total = moved[..., :after].sum((1, 2)) + (4 - after) * moved[..., after:].sum((1, 2))
    torch.testing.assert_close(total, full.sum((1, 2)))


def test_eigenvectors_are_found_again_in_double_precision(monkeypatch):
    eigh, calls = torch.linalg.eigh, []

    def stubborn(matrix):
        calls.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("no convergence")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    samples = Samples(torch.randn(1, 4, 3, dtype=torch.float32), torch.randn(1, 4, 2, dtype=torch.float32))
    basis = eigenbasis(samples, rank=3)
    assert basis.input.vectors.dtype == torch.float32
    assert torch.float64 in calls


def test_records_know_their_rest():
    assert Eigen(torch.zeros(1, 5, 2), torch.zeros(1, 2)).rest == 3
    assert (
        Basis(Eigen(torch.zeros(1, 5, 5), torch.zeros(1, 5)), Eigen(torch.eye(2)[None], torch.ones(1, 2))).input.rest
        == 0
    )
