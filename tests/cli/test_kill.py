"""SIGKILL at random moments: the folder stays whole, at most the steps since the last checkpoint are lost."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ocnopt.problems import learning_task
from ocnopt.runs import RunFolder
from ocnopt.training.trainer import TrainConfig, Trainer

CONFIG = TrainConfig("digits", "snopt", lr=0.01, horizon="feedback", iterations=12, batch_size=8, checkpoint_every=2)
ROOT = Path(__file__).parents[2]
OPTIONS = [
    "--optimizer=snopt",
    "--lr=0.01",
    "--horizon=feedback",
    f"--iterations={CONFIG.iterations}",
    "--batch-size=8",
]


def start(*arguments):
    code = "from ocnopt.cli.main import app; app()"
    command = [sys.executable, "-c", code, "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_lines(path, count, process):
    """Until the metrics hold a number of lines, or the run has ended."""
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL does not exist there")
def test_a_killed_run_ends_like_an_unbroken_one(tmp_path):
    moments = random.Random(0)
    folder = tmp_path / "run"
    metrics = folder / "metrics.jsonl"
    arguments = ["digits", *OPTIONS, "--checkpoint-every=2", f"--out={folder}"]
    reached = 0
    for kill in range(2):
        process = start(*arguments)
        wait_for_lines(metrics, reached + 4, process)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
        if process.returncode == 0 and kill > 0:  # a fast machine was done before the second kill
            reached = CONFIG.iterations
            break
        assert process.returncode == -signal.SIGKILL, output
        state = RunFolder.open(folder).load_checkpoint()
        done = len(RunFolder.open(folder).metrics())
        assert state is not None, f"no checkpoint after {done} iterations"
        assert done - state["iteration"] <= 2
        assert state["iteration"] > reached, f"kill {kill} found no progress"
        reached = state["iteration"]
        arguments = ["--resume", str(folder)]
    process = start(*arguments)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert f"resumed after iteration {reached} of {CONFIG.iterations}" in output
    assert (folder / "report.html").exists()

    unbroken = Trainer(learning_task("digits").build(), CONFIG)
    losses = [unbroken.step()["loss"] for _ in range(CONFIG.iterations)]
    assert [record["loss"] for record in RunFolder.open(folder).metrics()] == losses
    state = RunFolder.open(folder).load_checkpoint()["model"]
    assert all(torch.equal(state[name], value) for name, value in unbroken.model.state_dict().items())
