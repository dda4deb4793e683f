"""The command line, run inside the test's own process."""

import pytest
from typer.testing import CliRunner

from ocnopt.cli import main
from ocnopt.cli.main import app
from ocnopt.runs import RunFolder

paint = RunFolder.draw


def unpainted(folder, name, figure):
    """In the place of ``RunFolder.draw``: the figure was made and gets its file, but painting it takes longest."""
    folder.plots.mkdir(exist_ok=True)
    (folder.plots / f"{name}.png").touch()
    return f"plots/{name}.png"


def painted_once(folder, name, figure):
    """The same for a picture that is there already."""
    again = (folder.plots / f"{name}.png").exists()
    return (unpainted if again else paint)(folder, name, figure)


@pytest.fixture
def painted():
    """Asked for by tests that look at pictures, each painted by the first command that draws it."""


@pytest.fixture
def run(tmp_path, monkeypatch, request):
    """Run a command in an empty folder, on a wide terminal; returns exit code and everything printed."""
    monkeypatch.setattr(RunFolder, "draw", painted_once if "painted" in request.fixturenames else unpainted)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main.console, "_width", 200)
    monkeypatch.setattr(main.errors, "_width", 400)

    def invoke(*arguments):
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        invoke.stdout = result.stdout
        return result.exit_code, result.output

    return invoke


@pytest.fixture
def narrow(monkeypatch, run):
    """The same in 60 columns."""
    monkeypatch.setattr(main.console, "_width", 60)
    return run
