"""What commands have in common: plain errors, requests to stop, exit codes, a kind of option."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Literal

import click

from wsi_pipeline.errors import WsiPipelineError

__all__ = [
    "EXIT_CTRL_C",
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_USAGE",
    "auto_or_number",
    "exit_if_interrupted",
    "plain_errors",
    "signals",
]

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_CTRL_C = 1, 2, 75, 130


def auto_or_number(
    _context: click.Context, parameter: click.Parameter, value: str
) -> int | Literal["auto"]:
    """Check an option that takes a positive whole number or ``auto``."""
    if value == "auto":
        return "auto"
    if not value.isdecimal() or int(value) < 1:
        message = f"{value!r} is neither a positive whole number nor 'auto'"
        raise click.BadParameter(message, param=parameter)
    return int(value)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Show our own errors, and those of files and folders, as a message and no traceback."""
    try:
        yield
    except (WsiPipelineError, OSError, ValueError) as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(EXIT_USAGE) from error


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect requests to stop; a second Ctrl-C stops at once."""
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in caught:
            raise KeyboardInterrupt
        caught.append(number)
        name = signal.Signals(number).name
        os.write(2, f"{name}: finishing what is in work, then stopping\n".encode())

    wanted = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield caught
    except KeyboardInterrupt:
        raise SystemExit(EXIT_CTRL_C) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_if_interrupted(caught: Sequence[int]) -> None:
    """Leave with the exit code of a request to stop, if there was one."""
    if caught:
        raise SystemExit(EXIT_CTRL_C if signal.SIGINT in caught else EXIT_INTERRUPTED)
