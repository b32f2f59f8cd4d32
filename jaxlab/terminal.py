"""What commands have in common on a terminal: usage errors and tables."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import typer


@contextlib.contextmanager
def usage(what: str | None = None) -> Iterator[None]:
    """Turns the library's complaints about what was asked for into a usage error (exit code 2).

    Args:
      what: the argument or option at fault; None: the message names it.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, FileNotFoundError) as error:
        if os.environ.get("JAXLAB_TRACEBACK"):
            raise
        raise typer.BadParameter(one_line(error), param_hint=what) from None


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Raises the usage error of an option's unknown value, the valid ones listed."""
    if value not in choices:
        raise typer.BadParameter(f"expected one of {', '.join(choices)}, got {value!r}", param_hint=option)


def one_line(error: BaseException) -> str:
    """An exception as one line that says what is wrong."""
    if isinstance(error, ExceptionGroup):
        return f"{error.message}: " + "; ".join(one_line(each) for each in error.exceptions)
    if isinstance(error, KeyError) and error.args:
        error = ValueError(error.args[0])
    return " ".join(str(error).split()) or type(error).__name__


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows under their columns; without columns the rows are names and values."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=None, show_header=bool(columns))
    for column in columns or ("", ""):
        table.add_column(Text(column))
    for row in rows:
        cells = ("" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row)
        table.add_row(*map(Text, cells))  # a text in brackets is no markup
    Console().print(table)
