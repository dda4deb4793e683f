"""Lowered functions against torch: values, Jacobians and Hessians to 1e-12, and what cannot be lowered."""

import contextlib
import io
import math
import random
import sys

import casadi
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp

from ocnopt.errors import ProblemError
from ocnopt.solvers.lowering import tracing
from ocnopt.solvers.lowering.lowering import lower, scattered

F64 = torch.float64
X = torch.tensor([0.3, 0.7, -0.4, 1.2], dtype=F64)
M = torch.linspace(-1, 1, 16, dtype=F64).reshape(4, 4) + 2 * torch.eye(4, dtype=F64)
TABLE = torch.linspace(0, 1, 30, dtype=F64).reshape(10, 3) ** 2


def matches(function, point=X, tolerance=1e-12):
    """Value, Jacobian and the Hessian of a weighted sum at one point."""
    lowered = lower(function, scattered([point]), "dynamics").function()
    x = casadi.MX.sym("x", point.numel())
    y = lowered(x)
    weights = torch.linspace(0.5, 1.5, y.shape[0], dtype=F64)

    def scalar(z):
        return (function(z).reshape(-1) * weights).sum()

    hessian_of_sum, _ = casadi.hessian(casadi.dot(casadi.DM(weights.numpy()), y), x)
    ours = casadi.Function("check", [x], [y, casadi.jacobian(y, x), hessian_of_sum])(point.numpy())
    value, jacobian, second = (torch.from_numpy(np.array(casadi.densify(part).full())) for part in ours)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(value.reshape(-1), function(point).reshape(-1), **close)
    torch.testing.assert_close(jacobian, jacrev(lambda z: function(z).reshape(-1))(point), **close)
    torch.testing.assert_close(second, hessian(scalar)(point), **close)


def write_in_place(x):
    y = torch.zeros(4, dtype=F64)
    y[0] = x[1] * x[2]
    y[1:3] = x[:2] ** 2
    y[torch.tensor([3])] = 2.0
    y += x
    return y


def mechanics(x):
    """Accelerations from a Lagrangian, by torch.func inside the function."""
    q, v = x[:2], x[2:]

    def lagrangian(q, v):
        return 0.5 * (v**2).sum() * (2 + torch.cos(q).prod()) - torch.sin(q).sum()

    mass = hessian(lagrangian, argnums=1)(q, v)
    force = grad(lagrangian)(q, v) - jacfwd(grad(lagrangian, argnums=1))(q, v) @ v
    return torch.cat([v, torch.linalg.solve(mass, force)])


ENTRYWISE = {
    "arithmetic": lambda x: (2 * x - 1 / (x + 3)) / (x**2 + 1) + 0.5 * (-x) - (1 - x) * x,
    "integer powers": lambda x: x**3 + x**-1 + x**5,
    "real powers": lambda x: (x**2 + 1) ** 1.5 + (x * x) ** 0.5 + 2.0**x + (x * x + 1) ** x,
    "a vector of powers": lambda x: x ** torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64),
    "trigonometric": lambda x: torch.sin(x) * torch.cos(x) + torch.tan(x) + torch.atan(x),
    "inverse": lambda x: torch.asin(x / 2) + torch.acos(x / 3) + torch.atan2(x, x + 2),
    "hyperbolic": lambda x: torch.sinh(x) + torch.cosh(x) * torch.tanh(x) + torch.asinh(x) + torch.atanh(x / 2),
    "exponential": lambda x: torch.exp(x) + torch.expm1(x) + torch.log1p(x * x) + torch.exp2(x),
    "logarithms": lambda x: torch.log(x + 3) + torch.log2(x + 3) + torch.log10(x + 3) + torch.acosh(x + 3),
    "roots": lambda x: torch.sqrt(x + 3) + torch.rsqrt(x + 3) + torch.hypot(x, x + 2) + torch.reciprocal(x + 3),
    "absolute": lambda x: torch.abs(x) * torch.sign(x) * x + torch.copysign(x, -x),
    "bounds": lambda x: (
        torch.clamp(x, -0.3, 0.5) * x + torch.minimum(x, x**2) + torch.maximum(x, 1 - x) + x.clip(max=1)
    ),
    "choice": lambda x: torch.where((x > 0) & (x < 1) | ~(x > -1), x**2, x**3) + torch.where(x >= 0.5, 1.0, x),
    "comparison": lambda x: (x > 0).to(F64) * x + (x <= 0.5) * x**2 + ((x != 0) ^ (x == 0)) * x,
    "rounding": lambda x: torch.floor(x) * x + torch.ceil(x) + torch.remainder(x, 0.25) + torch.fmod(x, 0.25),
    "activations": lambda x: nn.functional.relu(x) * x + torch.sigmoid(x) + nn.functional.softplus(x),
    "smooth units": lambda x: nn.functional.gelu(x) + nn.functional.gelu(x, approximate="tanh") + nn.functional.silu(x),
    "other units": lambda x: nn.functional.elu(x) + nn.functional.leaky_relu(x) + nn.functional.hardtanh(x) * x,
    "error function": lambda x: torch.erf(x) + nn.functional.mish(x),
    "losses": lambda x: nn.functional.huber_loss(x, 2 * x) + nn.functional.mse_loss(x, x**2) + torch.lerp(x, x**2, 0.3),
    "ratios": lambda x: torch.addcmul(x, x, x, value=0.5) + torch.addcdiv(x, x, x + 3) + torch.sinc(x),
    "truncated": lambda x: (
        x * torch.trunc(3 * x) + x * (3 * x).to(torch.int64) + torch.div(x, 0.3, rounding_mode="floor")
    ),
}
MOVEMENT = {
    "stack": lambda x: torch.stack([x[1], -x[0], x[2] * x[3]], dim=-1),
    "cat with numbers": lambda x: torch.cat([x, torch.ones(2, dtype=F64), x[:2]]),
    "views": lambda x: (x.reshape(2, 2).T @ x.view(2, 2)).flatten() + x.unsqueeze(0).squeeze(0).expand(2, 4).sum(0),
    "slices": lambda x: x[..., 1:3] * x[..., ::2] + x[-2:],
    "split": lambda x: torch.cat([part * i for i, part in enumerate(x.split([1, 3]))]) + torch.cat(x.chunk(2)[::-1]),
    "unbind": lambda x: (lambda a, b, c, d: torch.stack((d, c, b * a)))(*x.unbind(-1)),
    "index": lambda x: x[[3, 1, 1]] * x[torch.tensor([0, 1, 2])],
    "gather": lambda x: x.gather(0, torch.tensor([2, 0, 0])) + torch.take_along_dim(x, torch.tensor([1, 2, 3]), 0),
    "flip and roll": lambda x: x.flip(0) * x.roll(1) + torch.diff(x, append=x[:1]),
    "repeat": lambda x: x.repeat(2) * x.repeat_interleave(2) + x.tile(2),
    "pad": lambda x: nn.functional.pad(x**2, (1, 2)) + nn.functional.pad(x, (2, 1), value=0.3),
    "diagonal": lambda x: torch.diag(x) + torch.diag_embed(x**2) + torch.tril(x.outer(x)) + torch.triu(x.outer(x), 1),
    "in place": write_in_place,
    "permute": lambda x: x.reshape(1, 2, 2).permute(2, 0, 1).movedim(0, -1) ** 2,
    "masks": lambda x: x.masked_fill(torch.tensor([True, False, False, True]), 2.0) * x,
    "likes": lambda x: torch.ones_like(x) * x + torch.zeros_like(x) + torch.full_like(x, 2.0) + x.new_ones(4),
    "meshes": lambda x: torch.arange(4, dtype=F64) * x + torch.linspace(0, 1, 4, dtype=F64) * x**2,
    "scatter": lambda x: torch.zeros(5, dtype=F64).scatter(0, torch.tensor([0, 2, 4, 1]), x**2),
    "a table": lambda x: TABLE[(3 * x.abs()).long()].sum(-1) * x,
    "one row of a table": lambda x: TABLE[torch.searchsorted(torch.linspace(0, 2, 9, dtype=F64), x[0])] * x[0],
}
JOINING = {
    "sums": lambda x: x.sum() * x + x.mean(-1, keepdim=True) + x.reshape(2, 2).sum(0).repeat(2) + (x**2).mean(),
    "products": lambda x: x.prod() * x + x.reshape(2, 2).prod(1).sum(),
    "extremes": lambda x: (
        x.amax() * x.amin() * x + x.max() + x.min(-1).values + x.reshape(2, 2).amax(0, keepdim=True).sum()
    ),
    "logic": lambda x: torch.where((x > -5).all() & (x > 1).any(), x**2, x),
    "spread": lambda x: x.var() + x.std() * x + x.var(correction=0),
    "norms": lambda x: x.norm() + torch.linalg.norm(x, ord=1) + torch.linalg.norm(x, ord=math.inf) + x.norm(p=3),
    "scans": lambda x: x.cumsum(0) * x.cumprod(-1) + (x.reshape(2, 2).cumsum(0) ** 2).flatten(),
    "softmax": lambda x: torch.softmax(x, -1) + torch.log_softmax(x, 0) + torch.logsumexp(x, -1),
    "layer norm": lambda x: (
        nn.functional.layer_norm(x, (4,), weight=X) + nn.functional.layer_norm(x.view(2, 2), (2,)).sum()
    ),
    "products of matrices": lambda x: M @ x + x @ M + torch.dot(x, x) + torch.einsum("i,ij,j->", x, M, x),
    "batched products": lambda x: torch.bmm(x.view(2, 2, 1), x.view(2, 1, 2)).flatten() + x.view(2, 2, 1).mT.sum(),
    "outer": lambda x: torch.outer(x, x) + torch.kron(x[:2], x[:2])[:, None] + torch.tensordot(x, x, 1),
    "cross": lambda x: torch.linalg.cross(x[:3], x[1:]) + torch.trapezoid(x) * x[:3],
    "addmm": lambda x: torch.addmm(M, x.view(4, 1), x.view(1, 4), beta=0.5, alpha=2.0),
    "solve": lambda x: torch.linalg.solve(torch.diag(x**2) + M, x) + torch.linalg.solve(M + x.outer(x), M).sum(0),
    "inverse": lambda x: torch.linalg.inv(M + torch.diag(x)) + torch.linalg.det(x.view(2, 2)),
    "a layer": lambda x: NET(x) + nn.functional.linear(x, M),
    "torch.func": lambda x: (
        jvp(torch.sin, (x,), (x**2,))[1] + jacrev(torch.cos)(x) @ x + grad(lambda z: (z**3).sum())(x)
    ),
    "mechanics": mechanics,
    "vmap": lambda x: torch.vmap(lambda row: row.sum() * row)(x.view(2, 2)),
}
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)).double()
CASES = ENTRYWISE | MOVEMENT | JOINING


@pytest.mark.parametrize("name", CASES)
def test_lowered_functions_agree_with_torch(name):
    matches(CASES[name])


@pytest.mark.parametrize("width", [8, 64])
def test_wide_networks_become_matrix_expressions(width):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 3)
    ).double()
    lowering = lower(lambda x: net(x) * x[..., :3], scattered([X]), "dynamics")
    assert lowering.kind is (casadi.SX if width == 8 else casadi.MX)
    matches(lambda x: net(x) * x[..., :3])


@pytest.mark.parametrize("name", ["views", "solve", "softmax", "choice", "in place", "a table", "extremes", "inverse"])
def test_operators_work_on_matrix_expressions_too(name):
    wide = torch.eye(4, 40, dtype=F64)
    matches(lambda x: CASES[name](x @ wide @ wide.T))


UNARY = [torch.sin, torch.tanh, torch.exp, lambda x: x**2, lambda x: 1 / (x**2 + 1), lambda x: -x, lambda x: x.flip(-1)]
BINARY = [lambda a, b: a + b, lambda a, b: a * b, lambda a, b: a - b, lambda a, b: torch.where(a > b, a, 2 * b)]
REDUCE = [lambda x: x.sum(-1, keepdim=True), lambda x: x.mean(0, keepdim=True), lambda x: x[..., :1] * x]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)), max_size=8))
def test_random_programs_agree_with_torch(program):
    def function(x):
        stack = [x, x.view(2, 2), torch.tensor([[0.3], [0.9]], dtype=F64) * x.view(2, 2)]
        for kind, choice, first, second in program:
            a, b = stack[first % len(stack)], stack[second % len(stack)]
            if kind == 0:
                stack.append(torch.tanh(UNARY[choice % len(UNARY)](a)))
            elif kind == 1 and a.shape[-1:] == b.shape[-1:]:
                stack.append(BINARY[choice % len(BINARY)](a, b))
            else:
                stack.append(REDUCE[choice % len(REDUCE)](a))
        return torch.cat([entry.reshape(-1) for entry in stack[-3:]])

    matches(function, tolerance=1e-11)


def test_several_arguments_and_outputs():
    def stage(k, x, u):
        return x + 0.1 * k.to(x.dtype) * u.sum(-1, keepdim=True), (x**2).sum(-1) + 1.0, 3.0

    lowered = lower(stage, [[torch.tensor(3), X, X[:2]], [torch.tensor(7), 2 * X, X[2:]]], "stage").function()
    x_next, cost, number = (float(casadi.sum1(part)) for part in lowered(2, X.numpy(), X[:2].numpy()))
    assert x_next == pytest.approx(float(X.sum() + 0.8 * X[:2].sum()), abs=1e-14)
    assert cost == pytest.approx(float((X**2).sum()) + 1.0, abs=1e-14)
    assert number == 3.0


def test_rows_of_a_batch_see_their_own_data():
    targets = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=F64)
    lowering = lower(lambda t, x: (x - targets) * t, scattered([torch.tensor(1.0, dtype=F64), targets]), "f", (3,))
    for row in range(3):
        lowered = lowering.function(row)
        assert lowered.size1_in(1) == 2
        assert np.allclose(lowered(2.0, [0.0, 0.0]).full()[:, 0], -2 * targets[row].numpy())


def test_rows_of_a_batch_of_wide_networks():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2)).double()
    x = torch.rand(3, 2, dtype=F64)
    lowering = lower(net, scattered([x]), "f", (3,))
    assert lowering.kind is casadi.MX
    assert np.allclose(lowering.function(1)(x[2].numpy()).full()[:, 0], net(x[2]).detach().numpy(), atol=1e-14)
    mixing = lower(lambda x: net(x) - net(x).mean(0), scattered([x]), "f", (3,))
    with pytest.raises(ProblemError, match="a row of the batch depends on another"):
        mixing.function(1)


def test_rows_of_a_batch_may_not_mix():
    x = torch.rand(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ProblemError, match="a row of the batch depends on another"):
        lower(lambda x: x - x.mean(0), scattered([x]), "dynamics", (3,)).function(1)


def test_float32_problems_are_compared_in_their_own_precision():
    weight = torch.tensor(0.1)
    lowered = lower(lambda x: torch.sin(x) * weight, scattered([X.float()]), "dynamics").function()
    assert float(lowered([1.0, 0, 0, 0])[0]) == pytest.approx(0.1 * math.sin(1.0), abs=1e-7)


class Counter:
    calls = 0

    def __call__(self, x):
        self.calls += 1
        return x * self.calls


def branch(x):
    return x if x.sum() > 0 else -x


def loop(x):
    while x.sum() < 10:
        x = x * 2
    return x


@pytest.mark.parametrize(
    "function",
    [
        lambda x: M[:, :0] @ x[:0] + x,
        lambda x: (M[:, :0] @ x[:0, None])[:, 0] + x,
        lambda x: torch.bmm(M.expand(3, 4, 4)[:, :, :0], x[:0].expand(3, 0)[..., None])[..., 0].sum(0) + x,
        lambda x: x + (x[:0] ** 2).sum() + x[:0].prod() + x[:0].norm(),
        lambda x: x + x[:0].expand(4, 0).sum(-1) + torch.cumsum(x[:0], 0).sum(),
        lambda x: torch.where((x[:0] > 0).any() | ~(x[:0] > 0).all(), x, 2 * x),
    ],
)
def test_an_axis_without_entries(function):
    lowered = lower(function, scattered([X]), "dynamics").function()
    assert np.allclose(lowered(X.numpy()).full()[:, 0], function(X).numpy())


def mutate(x):
    x[0] = 3.0
    return x * 2


OUTSIDE = torch.zeros(4, dtype=F64)


def write_outside(x):
    OUTSIDE[0] = x[0]
    return OUTSIDE * x


REFUSED = {
    "if": (branch, r"cost cannot be translated to CasADi: it branches or loops on the value.*use torch\.where"),
    "while": (loop, "branches or loops on the value"),
    "numpy": (lambda x: torch.as_tensor(np.sin(x.numpy())), "leaves torch for numpy.*write it in torch"),
    "item": (lambda x: x * math.sin(x[0].item()), r"turns a tensor into a Python number.*use torch\.sin"),
    "math": (lambda x: x * math.sin(x[0]), "turns a tensor into a Python number"),
    "torch.tensor": (lambda x: torch.tensor([x[0], x[1]]), r"builds a tensor from entries.*use torch\.stack"),
    "mask": (lambda x: x[x > 0], r"uses index.*shape of its result depends on the values; index with integers"),
    "random": (lambda x: x + torch.rand(4, dtype=F64), "draws random numbers; draw them outside"),
    "sort": (lambda x: x.sort().values, "uses sort.*no rule.*torch.amax"),
    "cholesky": (
        lambda x: torch.linalg.cholesky(torch.diag(x**2)),
        "uses linalg_cholesky_ex.*solver='ddp' takes any torch code",
    ),
    # 1 - erf(x) would lose every digit of the tail
    "erfc": (torch.erfc, "uses erfc, which cannot be translated to CasADi: there is no rule for it"),
    "a rule that fails": (
        lambda x: torch.softmax(x[:0], 0),
        r"uses _softmax in a way that cannot be translated to CasADi \(TypeError.*expected another form of it",
    ),
    "float32": (lambda x: x.float() * 2, r"result is torch\.float32 in a torch\.float64 problem"),
    "integer times float": (lambda x: (x.long() * 0.1).to(F64), "convert it first"),
    "argument": (mutate, "writes into its arguments.*clone them first"),
    "captured": (write_outside, "writes into a tensor made outside"),
    "none": (lambda x: None, r"returned \['NoneType'\]; expected tensors"),
    "counter": (Counter(), "in CasADi and .* in torch at entry 0.*frozen while tracing"),
    "module random": (lambda x: x * random.random(), "frozen while tracing"),
    "two indices": (lambda x: M[x.abs().long(), x.abs().long()], "must be the only one"),
    "moving gather": (lambda x: x.gather(0, x.abs().long()), "its index depends on the arguments"),
    "moving edges": (lambda x: torch.searchsorted(x, X).to(F64), "edges must be one vector of numbers"),
    "big determinant": (lambda x: torch.linalg.det(torch.eye(7, dtype=F64) * x[0]), "more than 6 rows"),
    "accumulate": (lambda x: x.index_put((torch.tensor([0, 0]),), x[:2], accumulate=True), "adds to entries"),
    "bits": (lambda x: x.long() & 1, "bits of integers"),
    "cond": (lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), "uses cond.*such as torch.where"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_lowered_is_named(name, capfd):
    function, message = REFUSED[name]
    with pytest.raises(ProblemError, match=message):
        lower(function, scattered([X.clone()]), "cost").function()
    out, err = capfd.readouterr()
    assert out == err == ""


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.where(torch.isnan(torch.sqrt(x)), 7.0, x),
        lambda x: torch.where(torch.sqrt(x) != torch.sqrt(x), 7.0, x),
        lambda x: torch.where(torch.sqrt(x) == torch.sqrt(x), x, 7.0),
        lambda x: torch.where(torch.isfinite(torch.log(x - 0.3)), x, 7.0),
        lambda x: torch.nan_to_num(torch.sqrt(x), 3.0),
    ],
)
def test_a_nan_is_seen(function):
    # at the second entry the root is NaN, at the first the logarithm is infinite
    lowered = lower(function, [[torch.tensor([0.3, -0.4], dtype=F64)]], "dynamics").function()
    for point in ([0.3, -0.4], [-0.4, 0.3], [0.3, 0.3]):
        expected = function(torch.tensor(point, dtype=F64)).tolist()
        assert [float(value) for value in lowered(point).full()[:, 0]] == expected


def test_a_failing_trace_says_what_it_met_and_prints_nothing(capfd):
    for function, hint in (
        (lambda x: x if x[0] > 0 else -x, "it branches or loops on the value of a tensor .*use torch.where"),
        (lambda x: x * float(x[0]), "it turns a tensor into a Python number"),
        (lambda x: torch.as_tensor(x.numpy()), "it leaves torch for numpy"),
    ):
        with pytest.raises(ProblemError, match=rf"{hint}.*\(solver='ddp' takes any torch code\)"):
            lower(function, [[X]], "dynamics")
    assert capfd.readouterr() == ("", "")


def test_tracing_leaves_the_standard_error_of_other_threads_alone():
    seen = []

    def function(x):
        seen.append(sys.stderr)
        return x

    with contextlib.redirect_stderr(io.StringIO()) as mine:
        lower(function, [[X]], "dynamics")
    assert all(stream is mine for stream in seen)


def test_a_captured_tensor_is_an_output_of_its_own():
    W = torch.tensor([3.0, 4.0], dtype=F64)
    one, two = lower(lambda x: (W, x), [[W.clone()]], "both").function()([5.0, 6.0])
    assert one.full()[:, 0].tolist() == [3.0, 4.0]
    assert two.full()[:, 0].tolist() == [5.0, 6.0]


def test_a_vector_times_a_matrix_is_traced_quickly(monkeypatch):
    """Inside it torch takes an axis away in place, which changes no number."""
    monkeypatch.setattr(tracing, "_export", None)
    A = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=F64)
    one, two = lower(lambda x: (x @ A, (x @ A)[:1] @ A[:1]), [[A[:, 0]]], "both").function()([10.0, 1.0])
    assert one.full()[:, 0].tolist() == [14.0, 25.0, 36.0]
    assert two.full()[:, 0].tolist() == [14.0, 28.0, 42.0]
