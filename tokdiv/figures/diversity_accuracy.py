"""Figure: token diversity of the teachers against the accuracy of their students.

After figure 1 of Pan et al. (arXiv 2304.12535).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tokdiv.figures.similarity import row_label
from tokdiv.figures.style import INK, legend_entry, new_figure, styled, teacher_looks


@styled
def diversity_accuracy_figure(
    table: pd.DataFrame,
    *,
    colors: Mapping[str, str] | None = None,
    accuracy_label: str = "accuracy of the pretrained student",
    width: float = 5.5,
) -> Figure:
    """Draw a marker per teacher, named in the legend in the order of the accuracies.

    Args:
        table: columns `name`, `diversity`, `accuracy`, and if known `baseline` (bool, hollow markers),
            `accuracy_low` and `accuracy_high` (error bars). Rows without diversity or accuracy are left out.
        colors: from `teacher_colors`; by default made from the names.
        accuracy_label: what the accuracy is, for the axis.
        width: inches.

    Raises:
        ValueError: a column is missing, or no row has both values.
    """
    for column in ("name", "diversity", "accuracy"):
        if column not in table:
            raise ValueError(f"no column {column!r} in {list(table)}: name, diversity and accuracy")
    table = table.dropna(subset=["diversity", "accuracy"])
    if table.empty:
        raise ValueError("no row with a diversity and an accuracy, expected at least one")
    names = [str(name) for name in table["name"]]
    known, markers, _ = teacher_looks(names, colors)
    columns = 2 if width >= 5 else 1
    legend_rows = math.ceil(len(names) / columns)
    figure = new_figure(width, max(0.62 * width, 2.8) + 0.17 * legend_rows)
    axes = figure.add_subplot()
    handles = []
    for row in table.sort_values("accuracy", ascending=False, kind="stable").to_dict("records"):
        name, baseline = str(row["name"]), bool(row.get("baseline") or False)
        low, high = row.get("accuracy_low", np.nan), row.get("accuracy_high", np.nan)
        face, edge = ("white", known[name]) if baseline else (known[name], INK)
        style: dict[str, Any] = {
            "marker": markers[name],
            "ms": 7,
            "mfc": face,
            "mec": edge,
            "mew": 1.0,
        }
        axes.vlines(row["diversity"], low, high, colors=known[name], linewidth=1.1, alpha=0.8)
        axes.plot(row["diversity"], row["accuracy"], linestyle="", **style)
        handles.append(legend_entry(row_label(name, baseline, 48, 1), "none", **style))
    axes.set_xlabel("token diversity (1 - mean token similarity)")
    axes.set_ylabel(accuracy_label)
    axes.margins(0.14)
    axes.grid()
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure
