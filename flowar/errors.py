"""The one exception whose message is written for the person at the terminal."""


class UserError(ValueError):
    """Something the user or the machine caused: the message says what was found, what was needed and what to do.

    The command line prints it in one line without a traceback; any other exception is a bug and keeps its traceback.
    """
