"""The errors that a user can mend: each message is one line that names what is wrong and what to do."""


class InputError(ValueError):
    """Bad input: an argument, a file or a folder. Command lines print the message and exit with status 2."""


class WorkError(RuntimeError):
    """The input was fine but the work failed. Command lines print the message and exit with status 1."""


class Cancelled(RuntimeError):
    """The caller's cancel event was set. Nothing has been written."""
