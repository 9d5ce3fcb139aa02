"""SIGTERM, by which clusters pre-empt a job: stop soon, but at a place that can be gone on from."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_TO_STOP = 8  # clusters kill some time after SIGTERM, often half a minute

_requested = False
_undisturbed = False
# shared with the workers that are forked from here
_patient = multiprocessing.Value("b", False, lock=False)


class Stopped(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt, no ordinary `except` may swallow it."""


def listen() -> None:
    """From now on SIGTERM raises Stopped: at once, or later inside the contexts below."""
    global _requested
    _requested = False
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGALRM, on_signal)


def on_signal(number: int, frame) -> None:
    global _requested
    if number == signal.SIGTERM and _requested:
        return  # a cluster and torchrun may both tell
    _requested = True
    if _undisturbed or (_patient.value and number == signal.SIGTERM):
        signal.alarm(SECONDS_TO_STOP)
        return
    raise Stopped


def requested() -> bool:
    """Whether SIGTERM has arrived: who asks is expected to leave `patiently` now."""
    return _requested


@contextmanager
def patiently() -> Iterator[None]:
    """Inside, SIGTERM only sets `requested`, so that a training step can end, for some seconds."""
    _patient.value = True
    try:
        yield
    finally:
        _patient.value = False
        signal.alarm(0)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, SIGTERM and its seconds wait until a file is written."""
    global _undisturbed
    _undisturbed = True
    try:
        yield
    finally:
        _undisturbed = False


def follow(number: int, frame) -> None:
    """A worker's answer to SIGTERM, which clusters send to all processes of a job.

    Its end would tear the run out of the step that it may finish; the run ends it soon enough.
    """
    if not _patient.value:
        os._exit(128 + number)
