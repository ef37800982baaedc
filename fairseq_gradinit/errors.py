"""The exceptions that users of this package are meant to read."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

TERMINAL_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class GradInitError(Exception):
    """Something a user can correct; the message says what is wrong, where, and what to do."""


class GradInitStopped(Exception):
    """The learning of scales was asked to stop, and did so after a whole iteration."""


def said_by(error: Exception) -> str:
    """All that an exception of another library says, on one line; its class if it says nothing."""
    return " ".join(TERMINAL_ESCAPE.sub("", str(error)).split()) or type(error).__name__


@contextmanager
def needs_plot(what: str) -> Iterator[None]:
    """Turn a missing package, which `what` need, into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in {"jinja2", "markupsafe", "matplotlib"}:
            raise
        raise GradInitError(
            f"{error.name}, which {what} need, is not installed: run "
            "`pip install 'fairseq-gradinit[plot]'`"
        ) from error
