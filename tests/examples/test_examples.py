"""Every example runs as a user would run it, and the README shows it as it is."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
# scripts with arguments and tables, too long for the README
ELSEWHERE = (
    "learn_from_demonstrations.py",
    "two_stage_rocket.py",
    "mpc_pendulum.py",
    "mpc_quadrotor.py",
    "independent_components.py",
    "orthogonal_layers.py",
    "runge_kutta_nets.py",
    "classify_images.py",
    "classify_series.py",
    "compiled_field.py",
    "estimate_density.py",
    "train_with_lightning.py",
)


def run(name, capsys):
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out


def test_every_example_is_tested():
    assert [path.name for path in SCRIPTS] == [
        "classify_images.py",
        "classify_series.py",
        "compiled_field.py",
        "drop_in_snopt.py",
        "estimate_density.py",
        "first.py",
        "independent_components.py",
        "learn_from_demonstrations.py",
        "mpc_pendulum.py",
        "mpc_quadrotor.py",
        "orthogonal_layers.py",
        "own_problem.py",
        "own_problem_against_casadi.py",
        "runge_kutta_nets.py",
        "train_with_lightning.py",
        "two_stage_rocket.py",
    ]


def test_first(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    output = run("first.py", capsys).splitlines()
    assert output[0].startswith("converged after")
    costs = [float(line.split()[1]) for line in output if line.startswith(("ddp ", "casadi "))]
    assert costs[0] == pytest.approx(costs[1], rel=1e-8)
    assert (tmp_path / "pendulum.png").stat().st_size > 0


def test_own_problem(capsys):
    output = run("own_problem.py", capsys)
    assert "converged" in output
    ends = {
        name: (float(along), float(across))
        for name, along, across in re.findall(
            r"(with feedback|open loop) +through gusts: ends at \((.*?), (.*?)\) m", output
        )
    }
    # feedback brings the boat to the dock, the open loop misses it by metres
    assert abs(ends["with feedback"][0]) < 0.3
    assert abs(ends["with feedback"][1] - 20) < 0.3
    assert abs(ends["open loop"][0]) > 1


def test_own_problem_against_casadi(capsys):
    output = run("own_problem_against_casadi.py", capsys)
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.startswith(("ddp ", "casadi "))}
    assert float(rows["ddp"][1]) == pytest.approx(float(rows["casadi"][1]), rel=1e-6)
    assert float(rows["ddp"][2]) == pytest.approx(float(rows["casadi"][2]), rel=1e-5)
    assert rows["ddp"][-1] == rows["casadi"][-1] == "yes"


def test_drop_in_snopt(capsys):
    output = run("drop_in_snopt.py", capsys)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert losses[-1] < 0.5 * losses[0]


def test_mpc_of_a_quadrotor(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["mpc_quadrotor.py", str(tmp_path / "loop.png")])
    output = run("mpc_quadrotor.py", capsys)
    assert "every solve converged" in output
    (mean,) = re.findall(r"mean ([\d.]+) m", output)
    assert float(mean) < 0.05
    assert (tmp_path / "loop.png").stat().st_size > 0


def test_mpc_of_a_pendulum(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mpc_pendulum.py"])
    output = run("mpc_pendulum.py", capsys)
    assert "every solve converged" in output
    assert "3.142 rad from below" in output


def test_two_stage_rocket(capsys):
    output = run("two_stage_rocket.py", capsys)
    assert "converged" in output
    first = float(re.search(r"burns for ([\d.]+)", output)[1])
    assert first == pytest.approx(0.3 * 0.9 / 2.2, abs=1e-4)  # the first stage's fuel at full thrust


def test_learn_from_demonstrations(capsys):
    output = run("learn_from_demonstrations.py", capsys)
    assert int(re.findall(r"^(\d+) of 80 torques", output)[0]) > 5
    found = re.findall(r"mass (\S+) \(1.4\), weights (\S+) \(3\) and (\S+) \(0.5\)", output)[0]
    assert [float(number) for number in found] == pytest.approx([1.4, 3.0, 0.5], rel=1e-4)


def test_independent_components(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["independent_components.py", str(tmp_path / "signals.png")])
    output = run("independent_components.py", capsys)
    distances = [float(number) for number in re.findall(r"Amari distance ([\d.]+)", output)]
    assert len(distances) == 4
    assert distances[0] > 0.3
    assert max(distances[1:]) < 0.03
    assert max(float(error) for error in re.findall(r"I\| (\S+)", output)) < 1e-14
    assert (tmp_path / "signals.png").stat().st_size > 0


def test_orthogonal_layers(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["orthogonal_layers.py", str(tmp_path / "gradients.png")])
    output = run("orthogonal_layers.py", capsys)
    rows = re.findall(r"(plain|starts orthogonal|stays orthogonal) +[\d.]+ +([\d.]+) % +(\S+)", output)
    assert len(rows) == 6
    for name, accuracy, ratio in rows:
        if name == "stays orthogonal":
            assert float(accuracy) > 60
            assert 0.05 < float(ratio) < 20
        if name == "plain":
            assert float(accuracy) < 20
            assert float(ratio) < 1e-4
    assert (tmp_path / "gradients.png").stat().st_size > 0


def test_runge_kutta_nets(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["", "--iterations", "12", "--sweeps", "3", "--sets", "spiral"])
    output = run("runge_kutta_nets.py", capsys)
    rows = re.findall(r"(\w+), ([\w+]+) +loss ([\d.]+) .*\|sum h - T\| (\S+)", output)
    assert len(rows) == 4 + 4
    assert max(float(error) for _, net, _, error in rows if net == "ODENet+simplex") < 1e-12
    losses = dict(re.findall(r"(start|DDP|L-BFGS-B|trust-constr|gradient descent) +loss ([\d.]+)", output))
    assert len(losses) == 5
    assert all(float(loss) <= float(losses["start"]) for loss in losses.values())
    assert float(losses["trust-constr"]) < 0.9 * float(losses["start"])


@pytest.mark.parametrize(("name", "iterations"), [("classify_images.py", 10), ("classify_series.py", 12)])
def test_classifiers(capsys, monkeypatch, name, iterations):
    monkeypatch.setattr("sys.argv", [name, str(iterations)])
    output = run(name, capsys)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert losses[-1] < losses[0] - 0.1
    assert float(re.search(r"test accuracy ([\d.]+) %", output)[1]) > 15


def test_estimate_density(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["estimate_density.py", "12", str(tmp_path / "density.png")])
    output = run("estimate_density.py", capsys)
    first, last = (float(loss) for loss in re.findall(r"iteration .*: ([\d.]+) nats", output))
    assert last < first - 0.1
    nats, bits = map(float, re.findall(r"([\d.]+) (?:nats|bits) an? ", output))
    assert nats == pytest.approx(bits * 2 * np.log(2), abs=2e-3)
    assert (tmp_path / "density.png").stat().st_size > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own question
def test_a_compiled_field(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["compiled_field.py", "3", "eager"])  # no compiler is needed for this backend
    losses = re.findall(r"loss ([\d.]+) -> ([\d.]+)", run("compiled_field.py", capsys))
    assert len(losses) == 2
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore")  # Lightning's own advice about loaders, loggers and processes
def test_train_with_lightning(capsys, monkeypatch):
    pytest.importorskip("lightning", reason="lightning is not installed")
    monkeypatch.setattr("sys.argv", ["train_with_lightning.py", "1"])
    assert float(re.search(r"test accuracy ([\d.]+) %", run("train_with_lightning.py", capsys))[1]) > 60


def test_the_demo_and_the_example_solve_the_same_problem():
    from ocnopt.cli import boat
    from ocnopt.solvers.solve import solve

    example = runpy.run_path(str(ROOT / "examples" / "own_problem.py"))["problem"]
    costs = [float(solve(problem, "ddp", steps=20).cost) for problem in (example, boat.problem())]
    assert costs[0] == costs[1]


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.name not in ELSEWHERE], ids=lambda path: path.name)
def test_the_readme_shows_the_example(path):
    body = path.read_text(encoding="utf-8").split('"""', 2)[2].strip()
    assert body in (ROOT / "README.md").read_text(encoding="utf-8")
