"""The kinds of failure that a user meets, each with its exit code."""

import signal

# SIGUSR1 is SLURM's warning before a job ends: the run is unfinished, as after SIGTERM.
EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
if hasattr(signal, "SIGUSR1"):
    EXIT_CODES[signal.SIGUSR1] = 143


class UsageError(ValueError):
    """A mistake in the call: the command line answers with one line and exit code 2.

    The message names the value, what was expected and what to do.
    """


class RunError(RuntimeError):
    """A failure while running (network, disk, a broken model): one line and exit code 1."""


class SharedError(RunError):
    """A failure that every process of a run gets to know; only the first process reports it."""


class LostPeer(SharedError):
    """Another process of the run ended or stopped answering; the first survivor reports it."""


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGUSR1 came, and the state is stored.

    Args:
        signal: its number.
        done: how far the run came, as "step 12" or "3 images".
    """

    def __init__(self, signal: int, done: str) -> None:
        super().__init__(f"interrupted after {done}; the same command goes on from there")
        self.signal = signal

    @property
    def exit_code(self) -> int:
        """Of the command line."""
        return EXIT_CODES.get(self.signal, 1)


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of what an error says, or the name of its type where it says nothing."""
    text = getattr(error, "strerror", None) or str(error)
    lines = str(text).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__
