"""Several processes train one run: it ends as one process ends it, goes on with another number, and never hangs."""

import multiprocessing
from dataclasses import asdict, replace

import pytest
import torch
from rich.console import Console

from ocnopt.cli.learning import run_train
from ocnopt.errors import DataError, ProblemError
from ocnopt.problems import learning_task
from ocnopt.runs import RunFolder
from ocnopt.training.parallel import check_processes, together
from ocnopt.training.trainer import TrainConfig, Trainer, advance, open_trainer, train
from tests.cli.conftest import unpainted

# 15 samples are shared out as 7 and 8; equal steps of the solver, as error control sees a batch as a whole
CONFIG = TrainConfig(
    "digits", "adam", lr=3e-3, horizon="feedback", iterations=4, batch_size=15, checkpoint_every=2, model={"steps": 2}
)


def folder_of(path, config):
    return RunFolder.create(path, {"command": "train", "train": asdict(config), "nproc": 1})


def assert_nothing_is_left():
    assert not torch.distributed.is_initialized()
    assert not multiprocessing.active_children()


def test_two_processes_go_on_where_one_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "draw", unpainted)
    task = learning_task("digits").build()
    unbroken, folder = folder_of(tmp_path / "one", CONFIG), folder_of(tmp_path / "two", CONFIG)
    train([(Trainer(task, CONFIG), unbroken)])
    trainer, _ = open_trainer(folder, task)
    for _ in range(3):
        advance(trainer, folder)
    run_train(RunFolder.open(tmp_path / "two"), Console(quiet=True), nproc=2)
    found, expected = folder.metrics(), unbroken.metrics()
    assert len(found) == len(expected) == CONFIG.iterations
    for one, other in zip(found, expected, strict=True):
        for key, value in other.items():
            assert key == "seconds" or one[key] == pytest.approx(value, rel=2e-5), key
    assert (tmp_path / "two" / "report.html").exists()
    assert_nothing_is_left()


def test_what_another_process_meets_is_told(tmp_path):
    folder = folder_of(tmp_path, CONFIG)
    trainer, _ = open_trainer(folder)
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(DataError, match="cannot be read"), together(folder, 2):
        trainer.step()
    assert_nothing_is_left()


def test_ctrl_c_ends_all(tmp_path):
    folder = folder_of(tmp_path, CONFIG)
    with pytest.raises(KeyboardInterrupt), together(folder, 2):
        raise KeyboardInterrupt
    assert_nothing_is_left()


def test_runs_that_cannot_be_shared():
    with pytest.raises(ProblemError, match=r"nproc is 16 for batches of 15 samples; expected a sample for each"):
        check_processes(CONFIG, 16)
    for name in ("backtracking", "msa", "ocnopt", "kfac"):
        with pytest.raises(
            ProblemError, match=f"nproc is 2 for the optimiser {name}, which needs more .* expected one"
        ):
            check_processes(replace(CONFIG, optimizer=name), 2)
        check_processes(replace(CONFIG, optimizer=name), 1)
