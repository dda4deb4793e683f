"""The models of the three families: what they compute, in closed form where there is one, and their pictures."""

import math

import matplotlib.image
import pytest
import torch

from ocnopt.neural.cnf import CNF
from ocnopt.ocp import FreeHorizon
from ocnopt.problems import learning_task
from ocnopt.problems.learning import latent, views
from ocnopt.problems.learning.fields import Squash, TimeLinear, TimeNet
from ocnopt.problems.learning.series import OdeRnn
from tests.oracles.compare import assert_close


@pytest.mark.usefixtures("float64")
def test_layers_that_see_the_time():
    t, x = torch.tensor(0.3), torch.randn(4, 3)
    joined, squashed = TimeLinear(3, 2), Squash(3, 2)
    W, b = joined.linear.weight, joined.linear.bias
    assert_close(joined(t, x), x @ W[:, :3].T + 0.3 * W[:, 3] + b)
    gate = torch.sigmoid(0.3 * squashed.gate.weight[:, 0] + squashed.gate.bias)
    assert_close(squashed(t, x), squashed.layer(x) * gate + 0.3 * squashed.shift.weight[:, 0])
    net = TimeNet(Squash, (3, 5, 3), torch.sin)
    assert_close(net(t, x), net.layers[1](t, torch.sin(net.layers[0](t, x))))


@pytest.mark.parametrize(
    ("name", "parameters"), [("digits_ode", 6_698), ("breast_cancer_flow", 8_568), ("circles_flow", 4_872)]
)
def test_the_published_sizes(name, parameters):
    model = learning_task(name).build().make_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_a_density_s_loss_and_metric():
    task = learning_task("breast_cancer_flow").build()
    assert task.split == "455 train, 114 test, stratified, seed 0"
    assert task.train_inputs is task.train_targets
    model = task.make_model(rtol=1e-1, atol=1e-1)
    measured = task.evaluate(model)
    exact = -model.eval()(task.test_inputs).mean()
    assert measured == {"test_nll": pytest.approx(exact.item(), rel=1e-4)}
    log_probabilities = torch.tensor([-1.0, -3.0])
    assert float(task.loss(log_probabilities, task.train_targets[:2])) == 2.0
    assert isinstance(task.make_model(FreeHorizon(1.0, 0.1, 2.0)).ode.horizon, FreeHorizon)


@pytest.mark.usefixtures("float64")
def test_an_ode_rnn_by_hand():
    model, x = OdeRnn(2, 3), torch.randn(4, 3, 2)
    h = torch.zeros(4, 32)
    for k in range(3):
        h = model.cell(x[:, k], model.ode(h) if k else h)
    assert_close(model(x), model.head(h))


@pytest.mark.usefixtures("float64")
def test_an_ode_rnn_at_irregular_times():
    """A gap of 1.5 is a flow for 1.5 units, and what follows the end of a series changes nothing."""
    model = OdeRnn(1, 2, gaps=True, rtol=1e-9, atol=1e-9)
    series = torch.tensor([[[0.0, 0.3], [1.5, -0.4], [0.5, 0.1]], [[0.0, 0.2], [2.0, 0.6], [math.nan, math.nan]]])
    h = model.cell(torch.tensor([[0.2]]), torch.zeros(1, 32))
    h = model.cell(torch.tensor([[0.6]]), model.ode(h, [0.0, 1.0, 2.0])[-1])
    assert_close(model(series)[1:], model.head(h), atol=1e-7)
    assert_close(model.states(series)[1, 2], model.states(series)[1, 1])
    model(series).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_spirals():
    task = learning_task("spirals").build(samples=50)
    seen = ~task.train_inputs.isnan().any(dim=2)
    assert bool((seen.sum(dim=1) == 20).all())
    # of the test part the targets are the places between the observations, and they lie on spirals without noise
    assert torch.equal(task.test_inputs.isnan(), ~task.test_targets.isnan())
    true = latent.paths(4, torch.Generator().manual_seed(0))
    radius = torch.linalg.vector_norm(true, dim=2)
    assert_close(radius[0].diff(), torch.full((39,), 0.15 * 2.5 * math.pi / 39), atol=1e-6)
    assert bool((radius[2:].diff(dim=1) < 0).all())


@pytest.mark.usefixtures("float64")
def test_the_evidence_lower_bound():
    """Against torch.distributions."""
    mean, log_variance, values = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 5, 2)
    targets = torch.where(torch.rand(3, 5, 1) < 0.5, math.nan, torch.randn(3, 5, 2))
    z = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    divergence = torch.distributions.kl_divergence(z, torch.distributions.Normal(0.0, 1.0)).sum()
    density = torch.distributions.Normal(values, latent.NOISE).log_prob(targets.nan_to_num())[~targets.isnan()].sum()
    outputs = latent.Decoded(values, mean, log_variance)
    assert_close(latent.negative_elbo(outputs, targets), (divergence - density) / 3)
    kept = ~targets[0, :, 0].isnan()
    expected = (values[0, kept] - targets[0, kept]).square().sum(dim=1).mean()
    assert_close(latent.squared_error(outputs, targets)[0], expected)


@pytest.mark.usefixtures("float64")
def test_the_encoder_reads_observations_alone():
    """Backwards, each with the time since the one read before; what was not observed does not count."""
    model = latent.LatentOde(1)
    series = torch.tensor([[[0.4], [math.nan], [math.nan], [0.7], [math.nan]]])
    h = model.cell(torch.tensor([[1.0, 0.7]]), torch.zeros(1, 32))
    h = model.cell(torch.tensor([[3.0, 0.4]]), h)
    assert_close(torch.cat(model.encode(series), dim=1), model.posterior(h))
    model.eval()
    values, mean, _ = model(series)
    assert_close(values[:, 0], model.decoder(mean))
    assert_close(values[:, -1], model.decoder(model.ode(mean)), atol=1e-6)
    model.train()
    assert not torch.equal(model(series).values, model(series).values)


def test_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(views, "CELLS", 20)
    flow = CNF(TimeNet(TimeLinear, (2, 4, 2)), 2, rtol=1e-2, atol=1e-2).eval()
    wide = CNF(TimeNet(TimeLinear, (5, 4, 5)), 5, rtol=1e-2, atol=1e-2).eval()
    path = torch.randn(4, 30, 6)
    spirals = learning_task("spirals").build(samples=2)
    model = spirals.make_model().eval()
    figures = [
        views.draw_samples(flow, torch.randn(50, 2)),
        views.draw_samples(wide, torch.randn(50, 5)),
        views.draw_transport(flow),
        views.draw_paths(path, torch.arange(30) % 3, [1 + i % 4 for i in range(30)]),
        spirals.pictures[0].draw(model, spirals),
    ]
    assert [len(figure.axes) for figure in figures] == [3, 2, 5, 1, 6]
    lines = figures[3].axes[0].collections[0].get_segments()  # those of class 0: each as long as its series
    assert [len(line) for line in lines] == [1, 4, 3, 2, 1, 4, 3, 2, 1, 4]
    figures[0].savefig(tmp_path / "density.png", dpi=30)
    assert matplotlib.image.imread(tmp_path / "density.png").std() > 0.05


@pytest.mark.parametrize("name", ["digits", "circles_flow"])
def test_the_pictures_of_a_task(name, monkeypatch):
    monkeypatch.setattr(views, "CELLS", 20)
    task = learning_task(name).build()
    model = task.make_model(rtol=1e-1, atol=1e-1).eval()
    assert all(picture.draw(model, task) is not None for picture in task.pictures)
