"""The four sets in the plane, the classifier and its pictures."""

import matplotlib.image
import pytest
import torch

from ocnopt.errors import ProblemError
from ocnopt.ocp import FreeHorizon
from ocnopt.problems import learning_task
from ocnopt.problems.learning import pictures, plane
from ocnopt.problems.record import accuracy
from tests.oracles.compare import assert_close

NAMES = ("donut1d", "donut2d", "squares", "spiral")
SHARES = {"donut1d": 1 / 3, "donut2d": 1 / 2, "spiral": 1 / 2}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", NAMES)
def test_a_set(name):
    data = learning_task(name).build()
    assert data.name == name
    for inputs, targets in ((data.train_inputs, data.train_targets), (data.test_inputs, data.test_targets)):
        assert inputs.shape == (500, 2)
        assert targets.shape == (500,)
        assert inputs.dtype == targets.dtype == torch.float64
        assert set(targets.tolist()) == {0.0, 1.0}
        if name in SHARES:
            assert float(targets.sum()) == round(500 * SHARES[name])
    assert len(torch.cat([data.train_inputs, data.test_inputs]).unique(dim=0)) == 1000
    again, other = plane.build(name), plane.build(name, seed=1)
    assert torch.equal(again.train_inputs, data.train_inputs)
    assert not torch.equal(other.train_inputs, data.train_inputs)
    assert data.split == "500 train, 500 test, generated with seed 0"


@pytest.mark.parametrize("name", ["donut1d", "donut2d"])
def test_radii_follow_their_densities(name):
    x, c = plane.points(name, 40_000, generator())
    r = torch.linalg.vector_norm(x, dim=-1) if name == "donut2d" else x[:, 0].abs()
    line = torch.linspace(-1, 1, 100, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line) if name == "donut2d" else torch.stack([line, torch.zeros_like(line)], -1)
    distance = torch.linalg.vector_norm(grid, dim=-1)
    for label, radius in ((1.0, 0.0), (0.0, 0.5)):
        weight = torch.exp(-((distance - radius) ** 2) / 0.02)
        chosen = x[c == label]
        # noise adds its variance to each coordinate
        for axis in (0, 1):
            spread = (weight * grid[:, axis] ** 2).sum() / weight.sum() + 0.01
            assert_close(chosen[:, axis].square().mean(), spread, rtol=0.05)
    assert float(r[c == 1].mean()) < 0.2 < float(r[c == 0].mean())


def test_the_sets_without_their_noise(monkeypatch):
    monkeypatch.setattr(plane, "SETS", {name: (draw, 0.0) for name, (draw, _) in plane.SETS.items()})
    x, c = plane.points("squares", 1000, generator())
    assert float(x.abs().max()) <= 0.7
    assert torch.equal(c, (x[:, 0] * x[:, 1] > 0).double())
    x, c = plane.points("spiral", 1000, generator())
    radius = torch.linalg.vector_norm(x, dim=-1)
    angle = 0.1 + (2 * torch.pi - 0.1) * (radius - 0.1) / 0.9 + torch.pi * c
    assert_close(x, radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1), atol=1e-12)
    x, _ = plane.points("donut1d", 100, generator())
    assert bool((x[:, 1] == 0).all())


def test_the_model_and_its_loss():
    data = plane.build("spiral", samples=7)
    model = data.make_model(tableau="kutta3", step="simplex", layers=4)
    out = model(data.train_inputs)
    expected = torch.sigmoid(model.net(data.train_inputs) @ model.head.weight[0] + model.head.bias)
    assert_close(out.detach(), expected.detach(), rtol=1e-12)
    assert float(data.loss(out, data.train_targets).detach()) == pytest.approx(
        float(((out - data.train_targets).detach() ** 2).sum()) / 14
    )
    right = [(o > 0.5) == bool(t) for o, t in zip(out.tolist(), data.train_targets, strict=True)]
    assert float(accuracy(out, data.train_targets).mean()) == pytest.approx(sum(right) / 7)


def test_messages():
    with pytest.raises(ProblemError, match="name is 'spirals'; expected .*did you mean 'spiral'"):
        plane.build("spirals")
    with pytest.raises(ProblemError, match="count is 0; expected a whole number of at least 1, 500 by default"):
        plane.build("spiral", samples=0)
    data = plane.build("spiral", samples=5)
    with pytest.raises(ProblemError, match='horizon is FreeHorizon.*; expected a number.*step="free"'):
        data.make_model(FreeHorizon(1.0, 0.5, 2.0))


def test_the_pictures(tmp_path):
    data = plane.build("spiral", samples=60)
    model = data.make_model(layers=5)
    shown = data.train_inputs, data.train_targets
    figure = pictures.draw_prediction(model, *shown, title="spiral")
    figure.savefig(tmp_path / "prediction.png")
    # points, and the level line 1/2 where the picture has one
    assert len(figure.axes[0].collections[-1].get_offsets()) == 60
    figure = pictures.draw_states(model, *shown)
    figure.savefig(tmp_path / "states.png")
    assert [axis.get_title() for axis in figure.axes] == ["input", *(f"after layer {k}" for k in range(1, 6))]
    last = figure.axes[-1].collections[0].get_offsets()
    assert_close(torch.as_tensor(last.data), model.net.states(shown[0])[-1].detach(), rtol=1e-12)
    nets = {"fixed": model.net.step_sizes, "learned": torch.rand(5)}
    figure = pictures.draw_step_sizes(nets)
    figure.savefig(tmp_path / "steps.png")
    assert_close([bar.get_height() for bar in figure.axes[0].patches], torch.cat(list(nets.values())), rtol=1e-6)
    for path in tmp_path.glob("*.png"):
        assert matplotlib.image.imread(path)[..., :3].std() > 0.02


def test_the_spiral_is_learned():
    from ocnopt.optim.backtracking import descend

    data = plane.build("spiral", samples=100)
    torch.manual_seed(1)
    model = data.make_model(step="simplex", layers=8)
    scales = [8**-2.0 if name.endswith("sizes") else 1.0 for name, _ in model.named_parameters()]
    loss = lambda: data.loss(model(data.train_inputs), data.train_targets)  # noqa: E731
    descend(model.parameters(), loss, 400, scales=scales)
    assert float(accuracy(model(data.train_inputs), data.train_targets).mean()) >= 0.97
    assert abs(float(model.net.step_sizes.sum()) - 1) < 1e-12
