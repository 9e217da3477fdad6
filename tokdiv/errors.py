"""The two kinds of failure that a user meets, each with its exit code."""


class UsageError(ValueError):
    """A mistake in the call: the command line answers with one line and exit code 2.

    The message names the value, what was expected and what to do.
    """


class RunError(RuntimeError):
    """A failure while running (network, disk, a broken model): one line and exit code 1."""


class SharedError(RunError):
    """A failure that every process of a run comes to know; the first of them reports it."""


class LostPeer(SharedError):
    """Another process of the run ended; the first of those that are left reports it."""


class Interrupted(Exception):
    """SIGINT or SIGTERM came; the state is stored. `signal` is its number; the exit code is 128 more."""

    def __init__(self, number: int, images: int) -> None:
        super().__init__(
            f"interrupted after {images:,} images; the same command goes on from there"
        )
        self.signal = number
