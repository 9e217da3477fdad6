"""The two kinds of failure that a user meets, each with its exit code."""


class UsageError(ValueError):
    """A mistake in the call: the command line answers with one line and exit code 2.

    The message names the value, what was expected and what to do.
    """


class RunError(RuntimeError):
    """A failure while running (network, disk, a broken model): one line and exit code 1."""
