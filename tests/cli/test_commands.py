"""The command line as a user meets it: help, tables, exit codes, messages, folders, --resume."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from ocnopt.cli import demo as demo_module
from ocnopt.cli import main
from ocnopt.cli.main import app
from ocnopt.cli.runs import RunFolder
from ocnopt.problems import names

COMMANDS = ("problems", "solve", "compare", "train", "demo")
TRAIN = ["--optimizer=adam", "--iterations=3", "--batch-size=16", "--checkpoint-every=2"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command in an empty folder, on a wide terminal; returns exit code and everything printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main.console, "_width", 200)
    monkeypatch.setattr(main.errors, "_width", 400)

    def invoke(*arguments):
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return invoke


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(run, command):
    code, output = run(command, "--help")
    assert code == 0
    assert "Examples:" in output
    assert f"ocnopt {command}" in output


def test_no_command_shows_all(run):
    _, output = run()
    assert all(command in output for command in COMMANDS)


def test_the_list_of_problems(run):
    code, output = run("problems")
    assert code == 0
    assert all(name in output for name in names())
    _, output = run("problems", "--kind", "learning")
    assert "digits" in output
    assert "scalar_lqr" not in output
    _, output = run("problems", "--kind", "control")
    assert "digits" not in output


def test_a_mistake_is_one_message(run):
    code, output = run("solve", "pendulum_swingup")
    assert code == main.MISTAKE
    assert "error: ProblemError: no problem is called 'pendulum_swingup'; did you mean 'pendulum_swing_up'?" in output
    assert "Traceback" not in output


def test_no_name(run):
    code, output = run("train")
    assert code == main.MISTAKE
    assert "no problem is named; expected 'ocnopt train NAME'" in output


def test_solve_writes_a_folder_and_resumes_it(run, tmp_path):
    code, output = run("solve", "scalar_lqr", "--steps", "20", "--out", "here")
    assert code == 0
    assert "0.7617172453" in output
    assert "report.html" in output
    folder = tmp_path / "here"
    assert json.loads((folder / "config.json").read_text())["steps"] == 20
    assert {path.name for path in (folder / "plots").iterdir()} == {
        "states.png",
        "controls.png",
        "gains.png",
        "convergence.png",
    }
    assert [record["iteration"] for record in RunFolder.open(folder).metrics()] == [0, 1]
    page = (folder / "report.html").read_text()
    assert all(f"plots/{name}.png" in page for name in ("states", "controls", "gains", "convergence"))

    before = (folder / "checkpoint.pt").read_bytes()
    (folder / "report.html").unlink()
    code, _ = run("solve", "--resume", "here")
    assert code == 0
    assert (folder / "report.html").exists()
    assert (folder / "checkpoint.pt").read_bytes() == before

    (folder / "checkpoint.pt").unlink()  # killed before it was written: solved again
    assert run("solve", "--resume", "here")[0] == 0
    assert [record["iteration"] for record in RunFolder.open(folder).metrics()] == [0, 1]


def test_a_solve_that_does_not_converge(run):
    code, output = run("solve", "pendulum_swing_up", "--steps", "20", "--max-iterations", "1")
    assert code == main.NOT_CONVERGED
    assert "iteration limit" in output


def test_a_solver_that_cannot(run):
    code, output = run("solve", "double_integrator_min_time")
    assert code == main.MISTAKE
    assert "use solver='casadi'" in output


def test_an_existing_folder_is_kept(run):
    assert run("solve", "scalar_lqr", "--steps", "5", "--out", "here")[0] == 0
    code, output = run("solve", "scalar_lqr", "--out", "here")
    assert code == main.MISTAKE
    assert "continue that run with --resume here" in output


def test_the_folder_of_another_command(run):
    assert run("solve", "scalar_lqr", "--steps", "5", "--out", "here")[0] == 0
    code, output = run("train", "--resume", "here")
    assert code == main.MISTAKE
    assert "was made by 'ocnopt solve'" in output


def test_compare(run, tmp_path):
    code, output = run("compare", "scalar_lqr", "--steps", "20", "--out", "here")
    assert code == 0
    assert "ddp" in output
    assert "casadi" in output
    assert (tmp_path / "here" / "ddp.pt").exists()
    assert (tmp_path / "here" / "casadi.pt").exists()
    assert "max |dx|" in (tmp_path / "here" / "report.html").read_text()


def test_compare_one_solver(run):
    code, output = run("compare", "scalar_lqr", "--steps", "5", "--solver", "ddp")
    assert code == 0
    assert "casadi" not in output


def test_train_and_resume(run, tmp_path):
    code, output = run("train", "digits", *TRAIN, "--out", "here")
    assert code == 0
    assert "Adam, learning rate 0.01, seed 0" in output
    folder = RunFolder.open(tmp_path / "here")
    assert len(folder.metrics()) == 3
    assert folder.load_checkpoint()["iteration"] == 3
    assert {path.name for path in folder.plots.iterdir()} == {"loss-time.png", "loss-iteration.png", "accuracy.png"}
    lines = (tmp_path / "here" / "metrics.jsonl").read_text()
    code, output = run("train", "--resume", "here")
    assert code == 0
    assert "resumed after iteration 3 of 3" in output
    assert (tmp_path / "here" / "metrics.jsonl").read_text() == lines


def test_epochs_become_iterations(run, tmp_path):
    code, _ = run("train", "digits", "--optimizer=adam", "--epochs=1", "--batch-size=700", "--out=here")
    assert code == 0
    assert RunFolder.open(tmp_path / "here").config["train"]["iterations"] == 2


def test_epochs_and_iterations(run):
    code, output = run("train", "digits", "--epochs", "1", "--iterations", "5")
    assert code == main.MISTAKE
    assert "--epochs 1 came with --iterations 5; expected one of them" in output


def test_an_unknown_optimiser(run):
    code, output = run("train", "digits", "--optimizer", "snop")
    assert code == main.MISTAKE
    assert "optimizer is 'snop'; expected one of adam, sgd, snopt; did you mean 'snopt'" in output


def test_ctrl_c(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ocnopt.cli.learning.train", interrupted)
    code, output = run("train", "digits", *TRAIN)
    assert code == 130
    assert "continue the run with --resume" in output


def test_a_run_resumes_with_its_threads(run, tmp_path):
    assert run("solve", "scalar_lqr", "--steps", "5", "--out", "here")[0] == 0
    config = json.loads((tmp_path / "here" / "config.json").read_text())
    (tmp_path / "here" / "config.json").write_text(json.dumps({**config, "threads": 2}))
    try:
        assert run("solve", "--resume", "here")[0] == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_the_demo(run, tmp_path, monkeypatch):
    original = demo_module._config
    monkeypatch.setattr(demo_module.boat, "STEPS", 15)
    monkeypatch.setattr(demo_module, "_config", lambda *a: replace(original(*a[:3], 12), batch_size=16))
    code, output = run("demo", "--seeds", "1", "--out", "here")
    assert code == 0, output
    for part in ("pendulum_swing_up", "own problem: a boat crosses a river", "Adam", "SNOpt + feedback T"):
        assert part in output
    page = (tmp_path / "here" / "report.html").read_text()
    images = sorted((tmp_path / "here" / "plots").iterdir())
    assert len(images) == 12
    assert all(f"plots/{path.name}" in page for path in images)
    lines = (tmp_path / "here" / "adam-fixed-seed0" / "metrics.jsonl").read_text()
    assert run("demo", "--resume", "here")[0] == 0
    assert (tmp_path / "here" / "adam-fixed-seed0" / "metrics.jsonl").read_text() == lines
