"""What commands have in common: plain errors, requests to stop, exit codes, how to compute."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Literal

import click

from wsi_pipeline.checked import plain_text
from wsi_pipeline.errors import WsiPipelineError
from wsi_pipeline.redaction import LogLines, Redaction

__all__ = [
    "EXIT_CTRL_C",
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_USAGE",
    "arithmetic_options",
    "collect_seldom",
    "deaf",
    "exit_if_interrupted",
    "log_to_stderr",
    "plain_errors",
    "signals",
    "tell",
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
            type=click.Choice(["auto", "fp32", "bf16", "fp16", "int8"]),
            help="Arithmetic of the network; int8 on a CPU.",
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


def collect_seldom() -> None:
    """Look for unreachable cycles of objects once in 10,000 new ones, not in 700 (2,000: 3.13).

    A sixth of what loading the libraries takes is such looking: they make some 500,000 objects,
    all of which stay. For the processes of commands; a library must not decide this for the
    program it is in. Nothing here relies on it: slides that are done are in no cycle.
    """
    gc.set_threshold(10_000, *gc.get_threshold()[1:])


def tell(line: str) -> None:
    """Print a line on the standard output, whatever names of files are in it."""
    click.echo(plain_text(line))


@contextmanager
def plain_errors(
    redaction: Redaction = Redaction(),  # noqa: B008 - frozen
    *,
    redact: bool = False,
) -> Iterator[None]:
    """Show our own errors, and those of files and folders, as a message and no traceback.

    Args:
        redaction: takes folders out of messages, and out of the traceback of any other error.
        redact: show the code alone, and nothing of what libraries log: they name files.
    """
    if redact:
        logging.disable()
    try:
        yield
    except Exception as error:
        ours = isinstance(error, WsiPipelineError | OSError | ValueError)
        if redact:
            code = error.code if isinstance(error, WsiPipelineError) else "internal"
            click.echo(f"Error: {code} (without --redact the message says more)", err=True)
        elif ours:
            click.echo(plain_text(redaction.text(f"Error: {error}")), err=True)
        elif redaction.folders:
            click.echo(redaction.text(traceback.format_exc()), err=True)
        else:
            raise
        raise SystemExit(EXIT_USAGE if ours or redact else EXIT_FAILED) from error
    finally:
        if redact:
            logging.disable(logging.NOTSET)


def log_to_stderr(*, verbose: bool, json_lines: bool = False, redaction: Redaction) -> None:
    """Show what the library logs on the standard error.

    Args:
        verbose: progress, too, not only warnings.
        json_lines: a JSON object a line.
        redaction: takes folders out of it.
    """
    level = logging.INFO if verbose else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogLines(json_lines=json_lines, redaction=redaction))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(capture=json_lines or bool(redaction.folders))


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


def deaf() -> None:
    """Heed no request to stop any more: the process ends, and its exit code is decided on."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def exit_if_interrupted(caught: Sequence[int]) -> None:
    """Leave with the exit code of a request to stop, if there was one."""
    if caught:
        raise SystemExit(EXIT_CTRL_C if signal.SIGINT in caught else EXIT_INTERRUPTED)
