"""The scores that a ranking was made of, as RUN/scores.parquet holds them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokdiv.errors import UsageError, first_line
from tokdiv.ranking import Ranking


@dataclass(frozen=True)
class RunScores:
    """What scores.parquet holds: n usable images, and the T teachers of the ranking in its order.

    Attributes:
        positions: int64 (n,), positions in the order of the run, ascending.
        keys: n names.
        values: float32 (n, T), NaN where a dropped teacher was not measured.
    """

    positions: NDArray[np.int64]
    keys: pa.ChunkedArray
    values: NDArray[np.float32]


def read_scores(path: Path, ranking: Ranking) -> RunScores:
    """The scores that a ranking was made of.

    Raises:
        UsageError: the file is missing, damaged, or holds other scores.
    """
    remedy = "repeat the `tokdiv rank` command"
    try:
        table = pq.read_table(path)
        columns = [table.column(teacher.name).to_numpy() for teacher in ranking.teachers]
        values = np.stack(columns, axis=1).astype(np.float32, copy=False)
        positions, keys = table.column("position").to_numpy(), table.column("key")
    except FileNotFoundError:
        raise UsageError(f"'{path}': no such file; {remedy}") from None
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise UsageError(
            f"'{path}' does not hold the scores of this ranking ({first_line(error)}); {remedy}"
        ) from None
    num_usable = ranking.data["images"] - ranking.data["unusable"]
    if len(positions) != num_usable:
        raise UsageError(
            f"'{path}' holds {len(positions):,} images, the ranking was made of {num_usable:,}; {remedy}"
        )
    return RunScores(positions, keys, values)
