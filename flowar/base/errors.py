"""How processes end: the exception whose message is written for the person at the terminal, signals, an exit code."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

EXIT_INTERRUPTED = 128 + signal.SIGINT  # as a shell has it
EXIT_AGAIN = 75  # EX_TEMPFAIL: stopped by one of these, nothing is lost; the same command goes on


class UserError(ValueError):
    """Something the user or the machine caused: the message says what was found, what was needed and what to do.

    The command line prints it in one line without a traceback; any other exception is a bug and keeps its traceback.
    """
