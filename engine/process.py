"""How a script begins and ends: signals, exit status, errors in one line.

SIGTERM is how clusters pre-empt a job: a run then stops soon, at a place to go on from.
"""

import atexit
import multiprocessing
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

import torch
import torch.distributed as dist

from models import capabilities

FULL_MEMORY = (
    "the {}'s memory is full: train on fewer images at a time with --micro_batch N, or take a "
    "smaller --batch_size"
)
STANDARD_OUTPUT = 1
SECONDS_TO_STOP = 8  # clusters kill some time after SIGTERM, often half a minute

stop_requested = False  # SIGTERM has arrived; who asks is expected to leave `patiently` soon
_undisturbed = False
# shared with worker processes, to which it is handed at their start
_patient = multiprocessing.Value("b", False, lock=False)


class UserError(Exception):
    """What is wrong, why, and the way out; the message is all that the user sees."""


class Stopped(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt, no ordinary `except` may swallow it."""


def listen() -> None:
    """From now on SIGTERM raises Stopped: at once, or later inside the contexts below."""
    global stop_requested
    stop_requested = False
    signal.signal(signal.SIGTERM, on_signal)
    if capabilities.alarms():
        signal.signal(signal.SIGALRM, on_signal)


def on_signal(number: int, frame) -> None:
    global stop_requested
    if number == signal.SIGTERM and stop_requested:
        return  # a cluster and torchrun may both tell
    stop_requested = True
    if _undisturbed or (_patient.value and number == signal.SIGTERM):
        wake_after(SECONDS_TO_STOP)
        return
    raise Stopped


@contextmanager
def patiently() -> Iterator[None]:
    """Inside, SIGTERM only sets `stop_requested` for some seconds, so that a step can end."""
    _patient.value = True
    try:
        yield
    finally:
        be_impatient()


def be_impatient() -> None:
    """From now on SIGTERM is heard at once again."""
    _patient.value = False
    wake_after(0)


def wake_after(seconds: int) -> None:
    """Have SIGALRM come, 0 for none; without it a step that is asked to stop takes its time."""
    if capabilities.alarms():
        signal.alarm(seconds)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, SIGTERM and its seconds wait until a file is written."""
    global _undisturbed
    _undisturbed = True
    try:
        yield
    finally:
        _undisturbed = False


def shared_patience():
    """What `listen_in_worker` wants; picklable where a process is being started."""
    return _patient


def listen_in_worker(patient) -> None:
    """A worker's answer to SIGTERM, which clusters send to all processes of a job.

    Its end would tear the run out of the step that it may finish; the run ends it soon enough.
    """

    def on_signal(number: int, frame) -> None:
        if not patient.value:
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, on_signal)


@contextmanager
def user_errors(thing: object = "") -> Iterator[None]:
    """Name the thing that a ValueError or OSError inside is about, and show it to the user.

    Without a thing the error names it.
    """
    begin = f"{thing}: " if thing else ""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{begin}{error}") from error
    except OSError as error:
        raise UserError(f"{begin}{error.strerror or error}") from error


def need(*packages: str) -> None:
    """Refuse to go on without packages that training does without."""
    for package in packages:
        try:
            import_module(package)
        except ImportError:
            raise UserError(
                f"the package {package} is not there: pip install -r requirements-export.txt"
            ) from None


def reason(error: Exception) -> str:
    """The first line of an error, short enough for a list."""
    text = str(getattr(error, "reason", "") or error).strip() or type(error).__name__
    return text.splitlines()[0][:100]


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main`. Exit status 2 for a user's error, 130 for Ctrl-C, 143 for SIGTERM, 141
    where nobody reads on, as behind `| head`.
    """
    listen()
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        if output_is_read():  # another pipe's end, which is to be seen
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), STANDARD_OUTPUT)  # Python flushes once more
        status = 128 + signal.SIGPIPE
    except UserError as error:
        status = fail(error, str(error), 2)
    except torch.OutOfMemoryError as error:
        full = FULL_MEMORY.format("GPU")
        status = fail(error, f"{full} ({str(error).partition('. ')[0]})", 2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        status = fail(error, FULL_MEMORY.format("machine"), 2)
    except KeyboardInterrupt as error:
        status = fail(error, "interrupted", 130)
    except Stopped as error:
        status = fail(error, "terminated", 143)
    else:
        status = 0
    leave(status)


def output_is_read() -> bool:
    """Whether there is still somebody at the other end of standard output; False where it cannot be
    asked.
    """
    if not capabilities.polls():
        return False
    poll = select.poll()
    poll.register(STANDARD_OUTPUT, 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def fail(error: BaseException, message: str, status: int) -> int:
    """Print what went wrong and what the run added on its way out, such as how to go on."""
    notes = "".join(f": {note}" for note in getattr(error, "__notes__", []))
    print(f"{os.path.basename(sys.argv[0])}: {message}{notes}", file=sys.stderr)
    return status


def leave(status: int) -> NoReturn:
    """End this process; where it is one of several, without Python's own finalization.

    DistributedDataParallel holds on to the group and so to gloo's threads, which now and then abort
    a finished process during finalization (pytorch/pytorch#179291, #190489): torchrun would start
    work again that was done, and an exit status would be lost.
    """
    if hasattr(signal, "SIGCHLD"):
        # a data loader's workers are ended with the program, which torch would report as a failure
        atexit.register(signal.signal, signal.SIGCHLD, signal.SIG_DFL)
    if not dist.is_initialized():
        sys.exit(status)
    if status == 0:  # in an error the others may not be there to take leave of
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
