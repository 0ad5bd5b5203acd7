"""The connection to a Dask scheduler: made, lost, and made again."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from wsi_pipeline.errors import JobError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Lost", "ask", "first_client", "next_client", "require", "require_scheduler"]

T = TypeVar("T")

CONNECT_S = 10.0
"""How long one attempt to reach a scheduler may take."""
AGAIN_S = 0.5
"""How soon the next attempt is made."""


class Lost(Exception):  # noqa: N818 - a state, not a fault
    """The scheduler does not answer, or has forgotten our tasks."""


def require_scheduler(address: str) -> None:
    """Make sure that a scheduler answers, before anything is written for a run on it.

    Raises:
        JobError: Dask is not installed, or nobody answers.
    """
    with suppress(OSError):  # it has answered; how the parting goes is no matter
        first_client(address).close(timeout=2)


def first_client(address: str) -> Client:
    """Connect to a scheduler.

    Raises:
        JobError: Dask is not installed, or nobody answers.
    """
    try:
        import distributed  # noqa: F401 - to say early that it is absent
    except ImportError as error:
        msg = (
            "--dask needs the package distributed, which is not installed here: "
            "pip install 'wsi-pipeline[cluster]'"
        )
        raise JobError(msg) from error
    try:
        return _client(address, CONNECT_S)
    except (OSError, ValueError) as error:
        msg = (
            f"no Dask scheduler answers at {address!r}: {error}. Is it running, is the address "
            "such as tcp://10.0.0.1:8786, and may this machine connect to it?"
        )
        raise JobError(msg) from error


def next_client(address: str, patience_s: float, stop: Callable[[], bool]) -> Client | None:
    """Return a client as soon as the scheduler answers again; None when patience has ended."""
    deadline = time.monotonic() + patience_s
    while (left_s := deadline - time.monotonic()) > 0 and not stop():
        try:
            return _client(address, min(left_s, CONNECT_S))
        except (OSError, ValueError):
            time.sleep(AGAIN_S)
    return None


def _client(address: str, seconds: float) -> Client:
    from distributed import Client
    from distributed.comm.addressing import parse_address
    from distributed.comm.registry import get_backend

    get_backend(parse_address(address)[0])  # a client of an unknown kind is never quite closed
    return Client(address, timeout=seconds, set_as_default=False)


def require(client: Client) -> None:
    """Make sure that the scheduler is there.

    Raises:
        Lost: it is not.
    """
    if client.status != "running":
        raise Lost(f"the connection is {client.status}")


def ask(call: Callable[..., T], *arguments: Any, **named: Any) -> T:  # noqa: ANN401 - as call has
    """Call what asks the scheduler.

    Raises:
        Lost: it is gone.
    """
    from distributed.client import ClosedClientError

    try:
        return call(*arguments, **named)
    except (OSError, ClosedClientError) as error:
        raise Lost from error
