"""How a command speaks to its user: two consoles, exit codes, and errors as one message each."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import ParamSpec

import typer
from rich.console import Console

from ocnopt.cli.tables import as_options
from ocnopt.errors import OcnoptError

console = Console()
errors = Console(stderr=True)

MISTAKE, STOPPED = 2, 130
Arguments = ParamSpec("Arguments")


def explain_errors(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Turn errors into one message and an exit code, and warnings into notes, in the words of the command line.

    Args:
        command: a command of the app.
    """
    again = "continue with --resume" if "resume" in inspect.signature(command).parameters else "repeat the command"

    @functools.wraps(command)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: tell("[yellow]note:[/yellow]", as_options(str(message)))
                command(*args, **kwargs)
        except OcnoptError as error:
            tell("[bold red]error:[/bold red]", f"{type(error).__name__}: {as_options(str(error))}")
            raise typer.Exit(MISTAKE) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            tell(
                "[bold red]error:[/bold red]",
                f"{error}; expected files that can be read and written: mend that, then {again}",
            )
            raise typer.Exit(MISTAKE) from error
        except KeyboardInterrupt as interrupt:
            tell("[bold red]stopped[/bold red]", "before anything was saved")
            raise typer.Exit(STOPPED) from interrupt

    return wrapped


def tell(kind: str, message: str) -> None:
    """One message on standard error.

    Args:
        kind: its first word, with markup.
        message: as it is.
    """
    errors.print(kind, end=" ")
    errors.print(message, markup=False, highlight=False, soft_wrap=True)
