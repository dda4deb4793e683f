"""The module around the solve: shapes, times, buffers, copies, modes, statistics, messages."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ocnopt.errors import ConvergenceError, NonFiniteError, OcnoptError, ProblemError
from ocnopt.neural.checks import check_options
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon, Horizon
from tests.neural.cases import Plain, Tanh, start


@given(
    batch=st.lists(st.integers(0, 3), max_size=3),
    adjoint=st.sampled_from(["discrete", "continuous", "backprop"]),
    outputs=st.integers(0, 3),
)
def test_any_batch_shape(batch, adjoint, outputs):
    field, x = Tanh(), torch.ones(*batch, 3, dtype=torch.float64, requires_grad=True)
    times = torch.linspace(0.1, 1.0, outputs, dtype=torch.float64) if outputs else None
    y = NeuralODE(field, adjoint=adjoint)(x, times)
    assert y.shape == ((outputs,) if outputs else ()) + x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape


@given(sizes=st.lists(st.integers(0, 3), min_size=1, max_size=3), rows=st.integers(0, 2), together=st.booleans())
def test_any_tuple(sizes, rows, together):
    x = tuple(torch.ones(rows if together else rows + i, size, dtype=torch.float64) for i, size in enumerate(sizes))
    field = Plain(lambda t, x: tuple(-part for part in x))
    at_times = NeuralODE(field, method="rk4")(x, [0.0, 1.0])
    for part, end in zip(x, at_times, strict=True):
        assert end.shape == (2, *part.shape)
        torch.testing.assert_close(end[1], part * torch.tensor(-1.0, dtype=torch.float64).exp(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_is_a_0d_tensor_of_the_state_s_dtype(dtype):
    seen = []

    def function(t, x):
        seen.append((t.shape, t.dtype, x.dtype))
        return -x

    y = NeuralODE(Plain(function))(torch.ones(2, dtype=dtype))
    assert y.dtype == dtype
    assert set(seen) == {(torch.Size([]), dtype, dtype)}


def test_a_field_may_work_on_its_time_in_place():
    def function(t, x):
        return (t.mul_(2.0) if t > 0 else t.sub_(1.0)) * torch.ones_like(x)

    x = torch.zeros(1, dtype=torch.float64)
    out_of_place = Plain(lambda t, x: (2 * t if t > 0 else t - 1) * torch.ones_like(x))
    y, expected = (NeuralODE(f, method="rk4", steps=3)(x) for f in (Plain(function), out_of_place))
    assert torch.equal(y, expected)


def test_backwards_undoes_forwards():
    field, x = Tanh(), start(4, 3)
    tight = {"rtol": 1e-10, "atol": 1e-10}
    y = NeuralODE(field, 1.5, **tight)(x)
    back = NeuralODE(field, Horizon(1.5, 0.0), **tight)(y)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)
    # Times that run against the horizon start from its end.
    both = NeuralODE(field, 1.5, **tight)(y, [1.5, 0.0])
    torch.testing.assert_close(both, torch.stack([y, x]), rtol=0, atol=1e-8)
    only = NeuralODE(field, 1.5, **tight)(y, [0.7, 0.0])
    torch.testing.assert_close(only[1], x, rtol=0, atol=1e-8)


def test_times_need_not_start_at_the_start():
    field, x = Tanh(), start(4, 3)
    ode = NeuralODE(field, rtol=1e-9, atol=1e-9)
    late = ode(x, [0.5, 1.0])
    torch.testing.assert_close(late, ode(x, [0.0, 0.5, 1.0])[1:], rtol=0, atol=0)
    torch.testing.assert_close(late[1], ode(x), rtol=0, atol=1e-7)
    torch.testing.assert_close(ode(x, torch.tensor([0.5], dtype=torch.float64)), late[:1], rtol=0, atol=1e-7)
    assert torch.equal(ode(x, [0.0]), x[None])


def test_a_free_horizon_is_a_buffer():
    ode = NeuralODE(Tanh(), FreeHorizon(0.8, 0.1, 2.0))
    assert set(ode.state_dict()) == {"T", *(f"field.{name}" for name in ode.field.state_dict())}
    ode.T.fill_(1.3)
    other = NeuralODE(Tanh(), FreeHorizon(0.8, 0.1, 2.0))
    other.load_state_dict(ode.state_dict())
    x = start(4, 3)
    assert torch.equal(other(x), ode(x))
    assert "T" not in NeuralODE(Tanh(), 1.0).state_dict()
    fixed = NeuralODE(ode.field, 1.3)
    torch.testing.assert_close(fixed(x), ode(x), rtol=0, atol=0)
    assert ode.float().T.dtype == torch.float32
    assert "FreeHorizon" in repr(ode)


def test_copies_work_and_are_not_observed():
    ode, x = NeuralODE(Tanh(), FreeHorizon(0.8, 0.1, 2.0)), start(4, 3)

    class Refuses:
        def stage(self, input_weight, gradient_weight):
            raise AssertionError("observed")

        def terminal(self, x, slope, costate):
            raise AssertionError("observed")

    handle = ode.observe(Refuses())
    expected = NeuralODE(ode.field, 0.8)(x)
    file = io.BytesIO()
    handle_free = copy.deepcopy(ode)
    torch.save(handle_free, file)
    file.seek(0)
    after = copy.deepcopy([ode, ode(x)][0])  # with a solve behind it
    for twin in (handle_free, after, torch.load(file, weights_only=False)):
        y = twin(x)
        assert torch.equal(y, expected)
        y.sum().backward()
        assert twin.field.inner.weight.grad is not None
        assert twin.field is not ode.field
    with pytest.raises(AssertionError, match="observed"):
        ode(x).sum().backward()
    handle.remove()
    ode(x).sum().backward()


def test_a_module_with_a_picklable_field_pickles():
    ode = NeuralODE(Tanh())
    x = start(4, 3)
    assert torch.equal(pickle.loads(pickle.dumps(ode))(x), ode(x))  # noqa: S301


@pytest.mark.parametrize("adjoint", ["discrete", "continuous", "backprop"])
def test_no_grad_and_eval(adjoint):
    ode, x = NeuralODE(Tanh(), adjoint=adjoint), start(4, 3)
    expected = ode(x).detach()
    with torch.no_grad():
        assert torch.equal(ode(x), expected)
        assert not ode(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(ode(x), expected)
    assert torch.equal(ode.eval()(x), expected)
    # Nothing needs gradients: nothing is kept.
    ode.requires_grad_(False)
    assert not ode(x).requires_grad


@pytest.mark.parametrize(
    "options", [{"adjoint": "discrete"}, {"adjoint": "continuous"}, {"adjoint": "backprop"}, {"error_norm": "sample"}]
)
def test_a_state_of_inference_mode_is_a_constant(options):
    field, x = Plain(lambda t, x: -field.rate * x, rate=torch.tensor(0.5).double()), start(4, 3)
    ode = NeuralODE(field, **options)
    with torch.inference_mode():
        frozen = x.clone()
    found = [torch.autograd.grad(ode(each).square().sum(), field.rate)[0] for each in (frozen, x)]
    assert torch.equal(*found)


def test_statistics_are_those_of_the_last_call():
    ode, x = NeuralODE(Tanh()), start(4, 3)
    first = ode(x)
    before = ode.statistics
    assert before.forward == 2 + 6 * (before.steps + before.rejected)
    assert before.backward == 0
    ode(x, [0.1, 0.2, 0.3])
    assert ode.statistics.steps == 3
    first.sum().backward()
    assert before.backward == 0  # the graph was kept
    assert ode.statistics.backward == 0
    ode.checkpoint_bytes = 0
    ode(x).sum().backward()
    assert ode.statistics.backward >= 6 * ode.statistics.steps


def test_the_cap_on_evaluations():
    ode = NeuralODE(Plain(lambda t, x: 1e4 * torch.sin(x)), max_evaluations=100)
    with pytest.raises(ConvergenceError, match="more than its 100 evaluations"):
        ode(start(5))


def test_a_nan_in_the_weights_is_named():
    ode = NeuralODE(Tanh())
    with torch.no_grad():
        ode.field.inner.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinity near t = 0 at the very start.*lower the learning rate"):
        ode(start(4, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": float("inf")}, "rtol is inf; expected a finite number >= 0"),
        ({"atol": float("nan")}, "atol is nan; expected a finite number >= 0"),
        ({"max_evaluations": float("nan")}, "max_evaluations is nan; expected a whole number of at least 1"),
        ({"adjoint_params": [1]}, "adjoint_params holds int; expected tensors, or a function"),
        ({"adjoint_params": lambda: None}, "adjoint_params holds NoneType; expected tensors"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ProblemError, match=message):
        NeuralODE(Tanh(), **options)(start(4, 3))


@pytest.mark.parametrize("budget", [None, -1, 1.5, "1", True, float("nan")])
def test_a_budget_is_a_number_of_bytes(budget):
    with pytest.raises(ProblemError, match=r"checkpoint_bytes is .*; expected a whole number of bytes"):
        check_options("rk4", "discrete", None, budget)


def test_what_observes_has_the_methods_of_an_observer():
    with pytest.raises(ProblemError, match=r"observer is function; expected an object with the method terminal"):
        inspect.unwrap(NeuralODE.observe)(NeuralODE(Tanh()), lambda *_: None)


@pytest.mark.parametrize("times", [0.5, "abc", [None]])
def test_times_are_numbers(times):
    with pytest.raises(ProblemError, match="times (is str|is list|has shape)"):
        inspect.unwrap(NeuralODE._read_times)(NeuralODE(Tanh()), times)


def test_unknown_names_offer_the_nearest():
    with pytest.raises(ProblemError, match="method is 'dopry5'; expected 'euler' or .*did you mean 'dopri5'"):
        NeuralODE(Tanh(), method="dopry5")
    with pytest.raises(ProblemError, match="adjoint is 'discret'; expected .*did you mean 'discrete'"):
        NeuralODE(Tanh(), adjoint="discret")


def test_a_field_without_time_is_told_how_to_get_one():
    with pytest.raises(ProblemError, match=r"forward takes \(input.*expected field\(t, x\).*forward\(self, t, x\)"):
        NeuralODE(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    with pytest.raises(ProblemError, match="expected field"):
        NeuralODE(nn.Linear(2, 2))


def test_what_torchdiffeq_would_ignore_is_refused():
    pytest.importorskip("torchdiffeq")
    with pytest.raises(
        ProblemError, match="steps=7 met method='fehlberg2' of torchdiffeq, which chooses its own steps"
    ):
        NeuralODE(Tanh(), method="fehlberg2", steps=7)
    for adjoint in ("discrete", "backprop"):
        with pytest.raises(ProblemError, match='gradients would be cut off; expected adjoint="continuous"'):
            NeuralODE(Tanh(), method="scipy_solver", adjoint=adjoint)


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_the_cap_on_evaluations_holds_for_torchdiffeq(adjoint):
    pytest.importorskip("torchdiffeq")
    ode = NeuralODE(Tanh(), method="fehlberg2", max_evaluations=20, rtol=1e-9, atol=1e-9, adjoint=adjoint)
    with pytest.raises(ConvergenceError, match="more than its 20 evaluations of the field and stands at t = "):
        ode(start(4, 3))
    assert ode.statistics.forward == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_horizon_is_not_rounded_with_the_weights(dtype):
    ode = NeuralODE(Tanh(), FreeHorizon(0.8, 0.1, 2.0))
    ode.T.fill_(0.8123)
    model = nn.Sequential(ode).to(dtype)
    assert ode.field.inner.weight.dtype == dtype
    assert ode.T.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(ode.T) == pytest.approx(0.8123, abs=1e-7)
    assert "0.T" in model.state_dict()


@pytest.mark.parametrize("steps", [0, -3, True])
def test_steps_must_be_positive(steps):
    with pytest.raises(ProblemError, match="steps is .*; expected a positive whole number, or None"):
        NeuralODE(Tanh(), steps=steps)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([], r"times has shape \(0,\)"),
        (torch.ones(2, 2, dtype=torch.float64), r"times has shape \(2, 2\)"),
        (torch.tensor([False, True]), "dtype torch.bool; expected a vector"),
        ([-0.5, 1.0], "times begin at -0.5, behind the start 0.0 of the path; .*horizon=oc.Horizon"),
        ([2.0, 1.0], "times begin at 2.0, behind the start 1.0"),
        ([0.5, 1.0, 0.5], "do not run in one direction"),
        ([0.2, 0.5, 0.4], "do not run in one direction"),
    ],
)
def test_wrong_times(times, message):
    with pytest.raises(ProblemError, match=message):
        NeuralODE(Tanh())(start(4, 3), times)


def test_states_of_the_wrong_kind():
    with pytest.raises(ProblemError, match="the state holds a tensor of torch.int64; expected a floating-point tensor"):
        NeuralODE(Tanh())(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ProblemError, match="parts of the state differ: .*float32.*float64"):
        NeuralODE(Tanh())((torch.ones(2), torch.ones(2, dtype=torch.float64)))
    with pytest.raises(ProblemError, match=r"the state holds a tensor of torch.complex64; .*torch.view_as_real"):
        NeuralODE(Tanh())(torch.ones(2, 3, dtype=torch.complex64))


@pytest.mark.parametrize("adjoint", ["discrete", "continuous", "backprop"])
def test_dtypes_of_state_and_field(adjoint):
    ode, x = NeuralODE(Tanh().float(), adjoint=adjoint), start(4, 3)
    with pytest.raises(
        ProblemError, match=r"of torch.float32 failed on a state of torch.float64 .*x.to\(torch.float32"
    ):
        ode(x)
    with pytest.raises(ProblemError, match=r"field returned a tensor of torch.complex128 .*expected a real one"):
        NeuralODE(Plain(lambda t, x: 1j * x), adjoint=adjoint)(x)
    # torch promotes where a field is elementwise
    assert (
        NeuralODE(Plain(lambda t, x: -ode.field.outer.bias.detach() * x), adjoint=adjoint)(x.detach()).dtype == x.dtype
    )


@pytest.mark.parametrize(
    ("function", "came"),
    [
        (lambda t, x: x[:, :1], r"\[\(2, 1\)\]"),
        (lambda t, x: (x, x), r"\['tuple'\]"),
        (lambda t, x: 3.0, r"\['float'\]"),
    ],
)
def test_fields_that_return_the_wrong_shape(function, came):
    with pytest.raises(ProblemError, match=rf"the field returned {came}; expected .*shapes \[\(2, 3\)\]"):
        NeuralODE(Plain(function))(torch.ones(2, 3))


def test_a_tuple_field_that_returns_the_wrong_parts():
    with pytest.raises(ProblemError, match=r"the field returned \[\(2,\)\]; expected .*shapes \[\(2,\), \(2,\)\]"):
        NeuralODE(Plain(lambda t, x: (x[0],)))((torch.ones(2), torch.ones(2)))


def test_what_cannot_be_observed_says_so():
    watcher = type("W", (), {"stage": lambda *a: None, "terminal": lambda *a: None})()
    with pytest.raises(ProblemError, match="adjoint='backprop' cannot be observed; expected one of .*discrete"):
        NeuralODE(Tanh(), adjoint="backprop").observe(watcher)
    pytest.importorskip("torchdiffeq")
    with pytest.raises(ProblemError, match="method='fehlberg2', .* cannot be observed"):
        NeuralODE(Tanh(), method="fehlberg2").observe(watcher)


def test_backprop_has_no_gradient_for_times_and_says_so():
    times = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    with pytest.raises(ProblemError, match='times that need gradients met adjoint="backprop"'):
        NeuralODE(Tanh(), adjoint="backprop")(start(4, 3), times)


@pytest.mark.parametrize("adjoint", ["discrete", "backprop"])
def test_second_derivatives_through_a_graph(adjoint):
    field, x = Tanh(), start(3)
    ode = NeuralODE(field, method="rk4", steps=3, adjoint=adjoint)
    assert torch.autograd.gradgradcheck(lambda x: ode(x), (x.requires_grad_(),))


def test_exchanged_parameters_are_refused():
    ode, x = NeuralODE(Tanh()), start(4, 3)
    other = {name: p.detach().clone().requires_grad_() for name, p in ode.named_parameters()}
    expected = torch.autograd.grad(ode(x).sum(), [*ode.parameters()])
    found = torch.autograd.grad(torch.func.functional_call(ode, other, (x,)).sum(), [*other.values()])
    assert all(torch.equal(one, right) for one, right in zip(found, expected, strict=True))
    ode.checkpoint_bytes = 0  # replayed
    y = torch.func.functional_call(ode, other, (x,))
    with pytest.raises(OcnoptError, match="parameters were exchanged between the forward and the backward pass"):
        y.sum().backward()


def test_parameters_changed_in_place_are_refused():
    ode, x = NeuralODE(Tanh()), start(4, 3)
    y = ode(x)
    with torch.no_grad():
        ode.field.inner.weight += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_freed_graph_is_freed():
    ode, x = NeuralODE(Tanh()), start(4, 3)
    y = ode(x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_a_field_without_parameters():
    x = start(4, 3)
    assert not NeuralODE(Plain(lambda t, x: -x))(x).requires_grad
    with pytest.raises(ProblemError, match="field is the class .*; expected an nn.Module or a function"):
        NeuralODE(nn.Linear)
