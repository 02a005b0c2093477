"""The error that means: show this sentence to the user."""


class RondelError(Exception):
    """Something a user can cause. The message says what, where, expected, got and what to do, in one or two lines."""


class RegressionError(RondelError):
    """What was asked for makes the model worse, by measurement: its own exit code, so that scripts can tell."""
