"""How processes end: the exception whose message is written for the person at the terminal, signals, an exit code."""

import os
import signal
import sys
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

EXIT_INTERRUPTED = 128 + signal.SIGINT  # as a shell has it
EXIT_AGAIN = 75  # EX_TEMPFAIL: stopped by one of these, nothing is lost; the same command resumes


class UserError(ValueError):
    """Something the user or the machine caused: the message says what was found, what was needed and what to do.

    The command line prints it in one line without a traceback; any other exception is a bug and keeps its traceback.
    """


def exit_with(reason: str | int) -> NoReturn:
    """End this process as `sys.exit` does; where it is one of several ranks at once, once the reason is written.

    The end of an interpreter waits for threads, and these may be waiting for ranks that wait for this one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(reason)
    if isinstance(reason, str):
        print(reason, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(reason if isinstance(reason, int) else 1)
