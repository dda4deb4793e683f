"""OCNOpt where something changes: gradients before the step, parameters after the start, options, outputs, threads."""

import copy
import threading
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from ocnopt.errors import ProblemError
from ocnopt.optim.ocnopt import OCNOpt
from ocnopt.optim.snopt import SNOpt
from tests.optim.test_ocnopt_use import differ, same

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:OCNOpt does not know the curvature"),
]
FORMS = pytest.mark.parametrize("form", ["batch", "sample", "gauss_newton"])
CURVATURES = pytest.mark.parametrize("curvature", ["identity", "kronecker"])


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def data(count=10):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, 5, generator=generator), torch.randint(3, (count,), generator=generator)


def divide(model, c):
    for p in model.parameters():
        p.grad *= c


def replace(model, c):
    for p in model.parameters():
        p.grad = c * p.grad


def divide_unseen(model, c):
    for p in model.parameters():
        p.grad.data.mul_(c)


def clip(model, c):
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    nn.utils.clip_grad_norm_(model.parameters(), c * float(norm))


@FORMS
@CURVATURES
@pytest.mark.parametrize("way", [divide, replace, divide_unseen, clip])
def test_a_multiple_of_the_gradient_is_the_step_of_that_multiple_of_lr(way, curvature, form):
    one, two, (x, y) = net(), net(), data()
    options = {"curvature": curvature, "form": form, "damping": 1.0}
    optimizers = OCNOpt(one, 2.0, **options), OCNOpt(two, 0.5, **options)
    for model, optimizer in zip((one, two), optimizers, strict=True):
        cross_entropy(model(x), y).backward()
        if model is one:
            way(model, 0.25)
        optimizer.step()
    assert differ(one, two) < (1e-5 if way is clip else 1e-12)  # clipping adds 1e-6 to the norm


@FORMS
def test_the_mean_over_passes_is_the_step_of_the_whole_batch(form):
    one, two, (x, y) = net(), net(), data()
    optimizers = [OCNOpt(model, 2.0, form=form) for model in (one, two)]
    cross_entropy(one(x), y).backward()
    for part in (slice(0, 5), slice(5, 10)):
        cross_entropy(two(x[part]), y[part]).backward()
    divide(two, 0.5)
    for optimizer in optimizers:
        optimizer.step()
    assert differ(one, two) < 1e-12


def test_clipped_training_goes_downhill():
    model, (x, y), losses = net(), data(), []
    optimizer = OCNOpt(model, 2.0)
    for _ in range(20):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    assert all(after < before for before, after in pairwise(losses))


@pytest.mark.parametrize("by_hook", [False, True])
def test_a_layer_of_zeroed_gradients_stays(by_hook):
    model, (x, y) = net(), data()
    optimizer, before = OCNOpt(model, 2.0), copy.deepcopy(model)
    if by_hook:
        for p in model[2].parameters():
            p.register_hook(torch.zeros_like)
    cross_entropy(model(x), y).backward()
    for p in () if by_hook else model[2].parameters():
        p.grad.zero_()
    optimizer.step()
    assert same(model[2], before[2])
    assert not same(model[0], before[0])


@CURVATURES
def test_gradients_of_another_direction_take_the_plain_step(curvature):
    model, (x, y) = net(), data()
    optimizer = OCNOpt(model, 0.5, curvature=curvature, damping=1.0)
    other = copy.deepcopy(model)
    plain = OCNOpt(other, 0.5, curvature=curvature, damping=1.0, feedback=False)
    for _ in range(2):
        for trained in (model, other):
            trained.zero_grad()
            cross_entropy(trained(x), y).backward()
            for p in trained.parameters():
                p.grad.clamp_(-0.01, 0.01)
        if "0.weight" not in str(optimizer._notes._said):
            with pytest.warns(UserWarning, match=r"are no multiple of what .*; expected one factor .*: '0.weight', '2"):
                optimizer.step()
        else:
            optimizer.step()
        plain.step()
    assert differ(model, other) < 1e-12


def test_terms_of_the_loss_in_the_same_pass_are_left_alone():
    model, (x, y) = net(), data()
    optimizer = OCNOpt(model, 0.5)
    (cross_entropy(model(x), y) + sum(p.square().sum() for p in model.parameters())).backward()
    optimizer.step()
    assert any((w != 1.0).any() for _, w in optimizer.answers.values())


def assigned(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def exchanged(model):
    model[2] = nn.Linear(7, 3)


def exchanged_parameter(model):
    model[2].weight = nn.Parameter(torch.ones(3, 7))


def appended(model):
    model.append(nn.Linear(3, 3))


@pytest.mark.parametrize("kind", [OCNOpt, SNOpt])
@pytest.mark.parametrize("change", [assigned, exchanged, exchanged_parameter, appended])
@pytest.mark.parametrize("late", [False, True])
def test_parameters_that_came_later(change, late, kind):
    model, (x, y) = net(), data()
    optimizer = kind(model, 0.1)
    for step in range(2 + late):
        if step == late:
            change(model)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        if step == late:
            with pytest.warns(
                UserWarning, match=r"the parameters '.*' of the model have gradients and are not trained"
            ):
                optimizer.step()
        else:
            optimizer.step()


@pytest.mark.parametrize("kind", [OCNOpt, SNOpt])
def test_a_part_that_is_trained_alone_is_nothing_to_warn_of(kind):
    model, (x, y) = net(), data()
    optimizer = kind(model, 0.1, param_groups=[{"params": model[2].parameters()}])
    cross_entropy(model(x), y).backward()
    optimizer.step()


class Two(nn.Module):
    """Logits, and what they are made of."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        h = self.net[:2](x)
        return h, self.net[2](h)


@pytest.mark.parametrize("terminal", ["auto", "cross_entropy"])
@pytest.mark.parametrize("factor", [None, 0.0])
def test_outputs_that_the_loss_does_not_use(terminal, factor):
    one, two, (x, y) = Two(), net(), data()
    optimizers = OCNOpt(one, 2.0, terminal=terminal), OCNOpt(two, 2.0, terminal=terminal)
    h, out = one(x)
    (cross_entropy(out, y) + (0.0 if factor is None else factor * h.sum())).backward()
    cross_entropy(two(x), y).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert differ(one.net, two) < 1e-12


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("size", [1e-12, 1e-3, 1.0, 1e3, 1e8])
def test_squares_of_any_size_take_the_same_step(size, dtype, close):
    """Targets, and so residuals, of that size: one step scales with it."""
    steps = []
    for s, kind in ((1.0, torch.float64), (size, dtype)):
        torch.manual_seed(0)
        model = nn.Linear(5, 1).to(kind)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        x, t = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
        optimizer = OCNOpt(model, 0.3, terminal="squares")
        mse_loss(model(x.to(kind)), (s * t).to(kind)).backward()
        optimizer.step()
        steps.append(model.weight.detach().double() / s)
    torch.testing.assert_close(steps[1], steps[0], rtol=close, atol=close * float(steps[0].norm()))


def test_a_terminal_that_works_in_place():
    one, two, (x, y) = net(), net(), data()
    optimizers = (
        OCNOpt(one, 0.5, terminal=lambda out, p: p.mul_(2.0)),
        OCNOpt(two, 0.5, terminal=lambda out, p: p * 2.0),
    )
    for model, optimizer in zip((one, two), optimizers, strict=True):
        cross_entropy(model(x), y).backward()
        optimizer.step()
    assert same(one, two)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"curvature": "adaptive"}, r"curvature='adaptive'; expected curvature='identity', as this one"),
        ({"game": "feedback"}, r"game='feedback'; expected game='cooperative'"),
        ({"form": "sample"}, r"form='sample'; expected form='batch'"),
        ({"terminal": lambda out, p: p}, r"terminal='a function'; expected terminal='auto'"),
    ],
)
def test_the_state_of_other_rules_is_refused(saved, message):
    model = net()
    with pytest.raises(ProblemError, match=message):
        OCNOpt(model, 0.1).load_state_dict(OCNOpt(model, 0.1, **saved).state_dict())


@pytest.mark.parametrize("curvature", ["identity", "adaptive", "kronecker"])
def test_the_state_of_other_shapes_is_refused(curvature):
    (x, y), one = data(), net()
    two = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    options = {"curvature": curvature, "momentum": 0.9, "damping": 1.0}
    optimizer = OCNOpt(one, 0.1, **options)
    cross_entropy(one(x), y).backward()
    optimizer.step()
    with pytest.raises(ProblemError, match=r"of shape \(.*\) for parameter 0, of shape \(6, 5\); expected the state"):
        OCNOpt(two, 0.1, **options).load_state_dict(optimizer.state_dict())
    with pytest.raises(ProblemError, match="the state holds 4 parameters; expected the 2 of this optimiser"):
        OCNOpt(nn.Linear(5, 3), 0.1, **options).load_state_dict(optimizer.state_dict())


def test_a_state_is_loaded_twice():
    model = net()
    optimizer = OCNOpt(model, 0.1)
    for _ in range(2):
        optimizer.load_state_dict(OCNOpt(model, 0.2).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.2


class Waits(nn.Module):
    """Halts in the middle of its first forward pass."""

    def __init__(self):
        super().__init__()
        self.net, self.inside, self.go_on = net(), threading.Event(), threading.Event()

    def forward(self, x):
        h = self.net[0](x)
        if not self.inside.is_set():
            self.inside.set()
            assert self.go_on.wait(20.0)
        return self.net[1:](h)


@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_in_another_thread(grad):
    model, (x, y) = Waits(), data()
    other, failed = net(), []
    optimizers = OCNOpt(model, 0.5), OCNOpt(other, 0.5)

    def evaluate():
        try:
            assert model.inside.wait(20.0)
            with torch.set_grad_enabled(grad):
                model(2 * x)
        except Exception as error:
            failed.append(error)
        finally:
            model.go_on.set()

    thread = threading.Thread(target=evaluate)
    thread.start()
    out = model(x)
    thread.join()
    assert not failed
    cross_entropy(out, y).backward()
    cross_entropy(other(x), y).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert same(model.net, other)


def test_kronecker_factors_without_damping():
    model, (x, y) = net(), data()
    optimizer = OCNOpt(model, 0.1, curvature="kronecker", damping=0.0)
    cross_entropy(model(x[:2]), y[:2]).backward()
    with pytest.raises(ProblemError, match=r"damping is 0.0, with which a Kronecker factor .*: raise damping"):
        optimizer.step()


@pytest.mark.parametrize("lr", ["a", -1.0, float("nan")])
@pytest.mark.parametrize("feedback", [False, True])
def test_a_learning_rate_set_later(lr, feedback):
    model, (x, y) = net(), data()
    optimizer, before = OCNOpt(model, 0.1, feedback=feedback), copy.deepcopy(model)
    cross_entropy(model(x), y).backward()
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ProblemError, match=r"lr is .*; expected a number >= 0, in param_groups\[0\], where it was"):
        optimizer.step()
    assert same(model, before)


@pytest.mark.parametrize("curvature", ["identity", "adaptive", "kronecker"])
def test_groups_of_one_metric_are_one(curvature):
    """Weights that decay beside biases that do not, the usual recipe, against a rate of 0 for all."""

    def groups(model, decay):
        weights = [p for p in model.parameters() if p.ndim > 1]
        return [
            {"params": weights, "weight_decay": decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "name": "biases"},
        ]

    options = {"curvature": curvature, "damping": 1.0}
    one, two, three, (x, y) = net(), net(), net(), data()
    optimizers = [
        OCNOpt(one, 0.5, **options),
        OCNOpt(two, 0.5, param_groups=groups(two, 0.0), **options),
        OCNOpt(three, 0.5, param_groups=groups(three, 0.1), **options),
    ]
    for model, optimizer in zip((one, two, three), optimizers, strict=True):
        cross_entropy(model(x), y).backward()
        optimizer.step()
    assert same(one, two)
    assert not same(one, three)
    assert curvature != "identity" or torch.equal(one[0].bias, three[0].bias)


def test_a_sample_without_a_leading_axis():
    model, (x, y) = net(), data()
    optimizer = OCNOpt(model, 0.1)
    cross_entropy(model(x[0]), y[0]).backward()
    with pytest.warns(UserWarning, match=r"on inputs with one row a sample \(x\[None\] for a single one\)"):
        optimizer.step()


@pytest.mark.filterwarnings("default:OCNOpt does not know the curvature")
def test_a_loss_that_is_not_recognised_is_named_once():
    model, (x, y) = net(), data()
    optimizer = OCNOpt(model, 0.1)
    for step in range(2):
        optimizer.zero_grad()
        cross_entropy(model(x), y, weight=torch.tensor([1.0, 2.0, 3.0])).backward()
        if step:
            optimizer.step()
            continue
        with pytest.warns(
            UserWarning, match=r"does not know the curvature of the loss of outputs \(10, 3\): .* p p\^T"
        ):
            optimizer.step()


def test_a_batch_that_is_too_large_is_named_once():
    model, (x, y) = net(), data(300)
    optimizer = OCNOpt(model, 0.1)
    cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match=r"a matrix of samples by samples .*: use smaller batches, or form="):
        optimizer.step()
    other = OCNOpt(model, 0.1, form="sample")
    for _ in range(2):
        for own in (optimizer, other):
            own.zero_grad()
            cross_entropy(model(x), y).backward()
            own.step()
