"""The exceptions that users of this package are meant to read."""


class GradInitError(Exception):
    """Something a user can correct; the message says what is wrong, where, and what to do."""


class GradInitStopped(Exception):
    """The learning of scales was asked to stop, and did so after a whole iteration."""
