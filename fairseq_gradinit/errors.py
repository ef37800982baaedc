"""The exceptions that users of this package are meant to read."""

import re

TERMINAL_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class GradInitError(Exception):
    """Something a user can correct; the message says what is wrong, where, and what to do."""


class GradInitStopped(Exception):
    """The learning of scales was asked to stop, and did so after a whole iteration."""


def said_by(error: Exception) -> str:
    """All that an exception of another library says, on one line; its class if it says nothing."""
    return " ".join(TERMINAL_ESCAPE.sub("", str(error)).split()) or type(error).__name__
