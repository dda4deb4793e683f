"""Studies: runs in turn are runs alone, a kill costs nothing, processes change nothing, a diverged run is a result."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from math import inf, isinf
from pathlib import Path

import joblib
import pytest
import torch

from ocnopt.errors import DataError, ProblemError
from ocnopt.optim.registry import OPTIMIZERS
from ocnopt.problems import Task, learning_task, names
from ocnopt.runs import RunFolder
from ocnopt.training import Method, Study, Trainer, outcomes, run_study, studies, trainer
from ocnopt.training.memory import peak_bytes
from ocnopt.training.studies import STUDIES, study, with_methods
from ocnopt.training.study import Progress, best, spread

ROOT = Path(__file__).parents[2]
SMALL = Study("small", "", ("wine",), (Method("sgd-plain", lr=0.1), Method("adam")), (1.0, 3.0), seeds=2, epochs=3)


def without_time(found):
    return [{key: value for key, value in line.items() if key != "seconds"} for o in found for line in o.lines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = RunFolder.create(tmp_path_factory.mktemp("unbroken"), {})
    return folder, run_study(SMALL, folder)


def test_a_run_of_a_study_is_a_run_alone(unbroken):
    task = learning_task("wine").build()
    for outcome in unbroken[1]:
        for seed, run in enumerate(outcome.runs):
            alone = Trainer(task, replace(outcome.config, seed=seed))
            assert [line["loss"] for line in run] == [alone.step()["loss"] for _ in run]
    assert [(o.method.optimizer, o.config.lr) for o in unbroken[1]] == [
        ("sgd-plain", 0.1),
        ("sgd-plain", 0.3),
        ("adam", 0.01),
        ("adam", 0.03),
    ]


def test_the_results_are_lines_of_json(unbroken):
    folder, found = unbroken
    lines = folder.metrics()
    assert lines == [line for outcome in found for line in outcome.lines()]
    assert lines[-1].keys() == {"problem", "method", "lr", "seed", "loss", "iterations", "seconds", "test_accuracy"}
    assert lines[-1]["loss"] == pytest.approx(sum(line["loss"] for line in found[-1].runs[-1][-4:]) / 4)


def test_an_interrupted_study_ends_like_an_unbroken_one(tmp_path, monkeypatch, unbroken):
    folder, real, left = RunFolder.create(tmp_path, {}), trainer.advance, [57]

    def interrupted(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_study(SMALL, folder)
    assert without_time(run_study(SMALL, folder)) == without_time(unbroken[1])


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL does not exist there")
def test_a_killed_study_over_processes_ends_like_an_unbroken_one(tmp_path, unbroken):
    folder = RunFolder.create(tmp_path, {"command": "study", "study": asdict(SMALL), "rates": SMALL.rates})
    import fcntl

    code = "from ocnopt.cli.main import app; app()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "study", "--resume", str(tmp_path), "--jobs=2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    progress = Progress(SMALL, folder)
    while process.poll() is None and progress.done.total() < 20:
        time.sleep(0.005)
        progress.update()
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in tmp_path.glob("wine-*"):  # the processes that it began see that it is gone, and let go
        with (path / ".lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
    assert without_time(run_study(SMALL, folder)) == without_time(unbroken[1])


def test_what_a_process_does_changes_nothing(tmp_path, unbroken):
    with joblib.parallel_config(backend="sequential"):  # in this process: starting others takes long
        found = run_study(SMALL, RunFolder.create(tmp_path, {}), jobs=2)
    assert without_time(found) == without_time(unbroken[1])


def test_a_run_that_diverges_is_a_result(tmp_path):
    asked = replace(SMALL, methods=(Method("sgd-plain", lr=3e38), Method("adam")), factors=(1.0,))
    folder = RunFolder.create(tmp_path, {})
    wild, tame = run_study(asked, folder)
    assert wild.losses == [inf, inf]
    assert wild.ends("test_accuracy") == []
    assert all(line["loss"] is None and line["iterations"] < 12 for line in wild.lines())
    assert tame.loss < 1
    assert [o.method.optimizer for o in best([wild, tame], "wine")] == ["sgd-plain", "adam"]
    before = [run for outcome in outcomes(asked, folder) for run in outcome.runs]
    assert [run for outcome in run_study(asked, folder) for run in outcome.runs] == before


def test_the_best_learning_rate(unbroken):
    leaders = best(unbroken[1], "wine")
    for leader in leaders:
        assert leader.loss == min(o.loss for o in unbroken[1] if o.method == leader.method)
    assert best(unbroken[1], "digits") == []


def test_progress_is_read_from_the_runs(unbroken):
    progress = Progress(SMALL, unbroken[0])
    progress.update()
    progress.update()
    assert progress.done == progress.totals == {("wine", 0): 48, ("wine", 1): 48}


def test_a_folder_of_another_study(unbroken):
    with pytest.raises(DataError, match=r"wine-sgd-plain-lr0.1-seed0 holds a run of .*; expected .*'iterations': 4"):
        run_study(replace(SMALL, epochs=1), unbroken[0])


def test_a_study_comes_back_from_json():
    assert Study.read(json.loads(json.dumps(asdict(study("neural-ode"))))) == study("neural-ode")


def test_the_spread_over_seeds():
    assert spread([1.0, 3.0]) == pytest.approx(2**0.5)
    assert spread([1.0]) == 0.0
    assert isinf(spread([1.0, inf]))


@pytest.mark.parametrize("name", STUDIES)
def test_the_studies_of_the_library(name):
    asked = study(name)
    assert asked.summary
    assert set(asked.problems) <= set(names("learning"))
    assert {method.optimizer for method in asked.methods} <= OPTIMIZERS.keys()
    labels = [method.label for method in asked.methods]
    assert len({*labels}) == len({method.name for method in asked.methods}) == len(labels)
    small = asked.quick()
    assert (small.epochs, small.seeds) == (66 if asked.epochs == 1000 else 1, 2)
    assert set(small.factors) <= set(asked.factors)


def test_a_method_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(studies, "OPTIMIZERS", {name: each for name, each in OPTIMIZERS.items() if name != "soap"})
    short = studies._known(Study("some", "some", ("digits_ode",), (Method("adam"), Method("soap"))))
    assert [method.name for method in short.methods] == ["adam"]
    assert "soap" in short.left_out
    assert "pip install 'ocnopt[peers]'" in short.left_out
    assert not with_methods(short, ["adam"]).left_out


def test_the_options_of_every_method_make_its_optimiser():
    for method in (method for each in STUDIES.values() for method in each.methods):
        if options := method.settings.get("options"):
            replace(OPTIMIZERS[method.optimizer], options=options).build(torch.nn.Linear(2, 2), 0.01)


def test_an_unknown_study():
    with pytest.raises(ProblemError, match="no study is called 'digit-feedback'; did you mean 'digits-feedback'"):
        study("digit-feedback")


def test_a_study_of_other_optimisers():
    chosen = with_methods(study("neural-ode"), ["snopt", "rmsprop"])
    assert [method.name for method in chosen.methods] == ["snopt", "snopt-feedback", "rmsprop"]
    with pytest.raises(ProblemError, match="optimizer is 'adamm'; expected one of adam, .*did you mean 'adam'"):
        with_methods(study("neural-ode"), ["adamm"])


def test_options_of_the_model():
    task = learning_task("digits_mlp").build()
    config = SMALL.configs("wine", 133, 0)[0][1]
    wide = Trainer(task, replace(config, problem="digits_mlp", model={"width": 7}))
    assert wide.model[1].weight.shape == (7, 64)
    with pytest.raises(ProblemError, match=r"the model of digits_mlp does not take the options depth .*; expected"):
        Trainer(task, replace(config, model={"depth": 3}))
    with pytest.raises(ProblemError, match="T came for the model of digits_mlp, which has 0 Neural ODEs; expected one"):
        Trainer(task, replace(config, horizon="feedback"))


def test_the_memory_of_an_optimiser():
    task = Task(
        name="line",
        train_inputs=torch.zeros(4, 1000),
        train_targets=torch.zeros(4, dtype=torch.int64),
        test_inputs=torch.zeros(4, 1000),
        test_targets=torch.zeros(4, dtype=torch.int64),
        make_model=lambda: torch.nn.Linear(1000, 100, bias=False),
        loss=torch.nn.functional.cross_entropy,
        split="",
    )
    config = replace(SMALL.configs("wine", 133, 0)[0][1], batch_size=4)
    plain, momentum = (peak_bytes(task, replace(config, optimizer=name)) for name in ("sgd-plain", "sgd"))
    weights = 400_000
    assert 2 * weights <= plain < 2.5 * weights  # the weights and their gradient
    assert momentum == pytest.approx(plain + weights, rel=0.05)
