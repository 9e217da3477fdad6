"""Progress of long work on stderr: a bar in a terminal or a notebook, elsewhere a plain line every 30 s."""

import io
import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm.std import tqdm

log = logging.getLogger(__name__)

SECONDS = 30  # between two lines, where stderr is a log file
LINE = "{percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
LINE_WITHOUT_TOTAL = "{n_fmt} [{elapsed}, {rate_fmt}{postfix}]"


def progress_bar(
    iterable: Iterable[Any] | None = None, *, show: bool = True, **options: Any
) -> Any:
    """A tqdm over `iterable`, or one that `update(n)` moves.

    Args:
        show: False for every process but the first.
        **options: of tqdm, as total, initial, desc, unit.
    """
    if not show:
        return tqdm(iterable, disable=True, **options)
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        from tqdm.auto import tqdm as bar

        return bar(iterable, **options)
    return _Lines(iterable, **options)


class _Lines(tqdm):
    """A tqdm that logs a line now and then in place of its bar."""

    def __init__(self, iterable: Iterable[Any] | None = None, **options: Any) -> None:
        self._logged = time.monotonic()
        # A file of its own: `tqdm.write` redraws the bars of stderr, and this one writes no `\r` to it.
        super().__init__(iterable, file=io.StringIO(), mininterval=1, leave=False, **options)
        label = "{desc}: " if self.desc else ""
        self.bar_format = label + (LINE if self.total else LINE_WITHOUT_TOTAL)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Log the state if it is time; tqdm calls this at every refresh."""
        if msg is None and time.monotonic() - self._logged >= SECONDS:
            self._logged = time.monotonic()
            log.info("%s", self)
