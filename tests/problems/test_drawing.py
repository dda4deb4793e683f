"""Every drawing draws: one instant, the picture, the film; what moves stays inside the frame."""

import io
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from ocnopt import problems
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.paths import rollout
from ocnopt.problems.drawing import animation, arrow, box, instants, picture, shape
from ocnopt.staged import transcribe

DRAWN = [name for name in problems.names("control") if problems.control(name).drawing is not None]
F64 = torch.float64


def path_of(name, steps=40):
    """A solution as far as a drawing reads it: the start's controls, or others, rolled out."""
    record = problems.control(name)
    problem = record.build() if isinstance(record.build(), OCP) else record.build(steps=steps)
    staged = transcribe(problem, steps) if isinstance(problem, OCP) else problem
    guess = record.initial_guess
    m = len(record.control_labels)
    controls = torch.full((steps, m), 0.3, dtype=F64) if guess is None else guess(steps)["controls"]
    p = staged.start_parameters()
    states = rollout(staged, list(controls), staged.initial_state, p).states
    numbered = staged.origin is None and staged.nodes is None
    return SimpleNamespace(times=staged.times(p), states=states, controls=controls, is_numbered=numbered)


def test_the_systems_that_move_are_drawn():
    without = {"scalar_lqr", "hager_lq", "catalyst_mixing_T1"}
    assert set(DRAWN) == set(problems.names("control")) - without


@pytest.mark.parametrize("name", DRAWN)
def test_one_instant(name):
    record = problems.control(name)
    problem = record.build()
    axes = Figure().subplots()
    control = torch.full((len(record.control_labels),), 0.5, dtype=F64)
    record.drawing.frame(axes, problem.initial_state, control, 0.0)
    drawn = [*axes.lines, *axes.patches]
    assert drawn
    assert all(torch.isfinite(torch.tensor(artist.get_path().vertices)).all() for artist in drawn)
    axes.figure.draw_without_rendering()


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture(name):
    path = path_of(name)
    drawing = problems.control(name).drawing
    figure = picture(drawing, path)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    if drawing.trace is not None:
        points = drawing.trace(path.times, path.states)
        assert points.shape == (41, 2)
        low, high = (torch.tensor(ends, dtype=F64) for ends in zip(axes.get_xlim(), axes.get_ylim(), strict=True))
        assert ((points >= low) & (points <= high)).all()


@pytest.mark.parametrize(("name", "unit"), [("unicycle_parking", "t = "), ("discrete_lqr_double_integrator", "step ")])
def test_a_film(name, unit, monkeypatch):
    titles = []
    axes_type = type(Figure().subplots())
    set_title = axes_type.set_title

    def watched(self, label, **options):
        title = set_title(self, label, **options)
        monkeypatch.setattr(title, "set_text", titles.append)
        return title

    monkeypatch.setattr(axes_type, "set_title", watched)
    film = animation(problems.control(name).drawing, path_of(name), frames=3)
    with Image.open(io.BytesIO(film)) as image:
        assert image.format == "GIF"
        assert image.n_frames == 3  # the last frame is held: what does not change is one frame that lasts
    assert titles[0].startswith(unit)


def test_instants_are_evenly_spaced():
    nodes = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    states = torch.tensor([[0.0], [1.0], [4.0]], dtype=F64)
    controls = torch.tensor([[5.0], [6.0]], dtype=F64)
    times, between, held = instants(SimpleNamespace(times=nodes, states=states, controls=controls), 5)
    assert times.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert between[:, 0].tolist() == [0.0, 0.5, 1.0, 2.5, 4.0]
    assert held[:, 0].tolist() == [5.0, 5.0, 6.0, 6.0, 6.0]


def test_a_shape_is_turned_and_moved():
    axes = Figure().subplots()
    shape(axes, box(2.0, 4.0), (10.0, 20.0), angle=torch.pi / 2)
    reach = axes.dataLim
    assert (reach.x0, reach.x1, reach.y0, reach.y1) == pytest.approx((8.0, 12.0, 19.0, 21.0))


def test_no_force_is_no_arrow():
    axes = Figure().subplots()
    arrow(axes, (0.0, 0.0), (0.0, 0.0), head=0.1)
    assert not axes.lines
    arrow(axes, (0.0, 0.0), (1.0, 0.0), head=0.1)
    assert axes.dataLim.x1 == pytest.approx(1.0)


def test_a_free_end_time_is_the_path_s_own():
    problem = problems.control("goddard_rocket").build()
    assert isinstance(problem.horizon, FreeHorizon)
    assert float(path_of("goddard_rocket").times[-1]) == pytest.approx(problem.horizon.initial)
