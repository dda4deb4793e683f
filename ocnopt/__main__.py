"""``python -m ocnopt`` is the command ``ocnopt``, where no script of that name is on the path."""

from ocnopt.cli.main import app

if __name__ == "__main__":
    app(prog_name="ocnopt")
