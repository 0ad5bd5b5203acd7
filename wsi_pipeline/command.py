"""What commands have in common: plain errors, requests to stop, exit codes, how to compute."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
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
    "arithmetic_options",
    "exit_if_interrupted",
    "plain_errors",
    "signals",
]

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_CTRL_C = 1, 2, 75, 130


def _auto_or_number(
    _context: click.Context, parameter: click.Parameter, value: str
) -> int | Literal["auto"]:
    """Check an option that takes a positive whole number or ``auto``."""
    if value == "auto":
        return "auto"
    if not value.isdecimal() or int(value) < 1:
        message = f"{value!r} is neither a positive whole number nor 'auto'"
        raise click.BadParameter(message, param=parameter)
    return int(value)


def arithmetic_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of how a network runs on a slide: on what, how much at a time."""
    amounts = {
        "--batch-size": "Tiles that the network sees at a time.",
        "--tile-size": "Side of a tile in pixels of the model's mpp, a multiple of 16.",
        "--workers": "Threads that read the slide, and that extract objects.",
    }
    options = [
        click.option(
            "--device",
            default="auto",
            show_default=True,
            help="auto, cpu, cuda, cuda:N, mps; of wsi-run also cuda:all, a process on each GPU, "
            "which divide --memory and processors.",
        ),
        click.option(
            "--precision",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
            help="Arithmetic of the network.",
        ),
        *(
            click.option(
                name,
                default="auto",
                show_default=True,
                metavar="N|auto",
                callback=_auto_or_number,
                help=text,
            )
            for name, text in amounts.items()
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


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
