"""The errors that a user can mend: each message is one line that names what is wrong and what to do."""

import re


class InputError(ValueError):
    """Bad input: an argument, a file or a folder. Command lines print the message and exit with status 2."""

    def __init__(self, message: str = "") -> None:
        # What a file says of itself, such as a name, may hold line ends and signs that a terminal obeys.
        super().__init__(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", message))


class WorkError(RuntimeError):
    """The input was fine but the work failed. Command lines print the message and exit with status 1."""


class Cancelled(RuntimeError):
    """The caller's cancel event was set. Nothing has been written."""
