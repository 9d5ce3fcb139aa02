"""SIGTERM, by which clusters pre-empt a job: stop soon, but at a place that can be gone on from."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_TO_STOP = 8  # clusters kill some time after SIGTERM, often half a minute

_requested = False
_patient = False


class Stopped(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt, no ordinary `except` may swallow it."""


def listen() -> None:
    """From now on SIGTERM raises Stopped, at once or, inside `patiently`, after some seconds."""
    global _requested
    _requested = False
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGALRM, on_signal)


def on_signal(number: int, frame) -> None:
    global _requested
    if _requested or not _patient:
        raise Stopped
    _requested = True
    signal.alarm(SECONDS_TO_STOP)


def requested() -> bool:
    """Whether SIGTERM has arrived: who asks is expected to leave `patiently` now."""
    return _requested


@contextmanager
def patiently() -> Iterator[None]:
    """Inside, SIGTERM only sets `requested`, so that a training step can end."""
    global _patient
    _patient = True
    try:
        yield
    finally:
        _patient = False
        signal.alarm(0)
