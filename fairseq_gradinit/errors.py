"""The one exception that users of this package are meant to read."""


class GradInitError(Exception):
    """Something a user can correct; the message says what is wrong, where, and what to do."""
