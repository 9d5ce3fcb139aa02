"""How a script begins and ends: signals, exit status, errors in one line."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from . import ranks, stopping
from .errors import UserError


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main`. Exit status 2 for a user's error, 130 for Ctrl-C, 143 for SIGTERM."""
    script = os.path.basename(sys.argv[0])
    stopping.listen()
    try:
        main()
    except UserError as error:
        status = fail(script, f"{error}{told(error)}", 2)
    except KeyboardInterrupt as error:
        status = fail(script, f"interrupted{told(error)}", 130)
    except stopping.Stopped as error:
        status = fail(script, f"terminated{told(error)}", 143)
    else:
        status = 0
    ranks.leave(status)


def told(error: BaseException) -> str:
    """What the run added to an interruption on its way out, such as how to go on."""
    return "".join(f": {note}" for note in getattr(error, "__notes__", []))


def fail(script: str, message: str, status: int) -> int:
    print(f"{script}: {message}", file=sys.stderr)
    return status
