"""What the terminal shows: tables of the zoo and of a ranking. Without torch, so that they are instant."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokdiv.teachers.cache import is_cached
from tokdiv.teachers.zoo import COUNTS, GROUPS, ZOO

if TYPE_CHECKING:
    from tokdiv.ranking import RankedTeacher, Ranking


def zoo_json() -> list[dict[str, Any]]:
    """Every teacher of the zoo, with K and C at 224 px and whether its weights are on this machine."""
    rows = []
    for name, spec in ZOO.items():
        counts = COUNTS[name]
        row = spec.to_dict() | counts._asdict() | {"K": counts.num_tokens, "C": counts.dim}
        rows.append(row | {"cached": is_cached(spec.weights) if spec.weights else None})
    return rows


def zoo_table() -> str:
    """The zoo as a table, and its groups."""
    rows = [("NAME", "METHOD", "ARCHITECTURE", "K", "C", "PARAMS", "LICENSE", "CACHED", "WEIGHTS")]
    rows += [
        (
            row["name"],
            row["method"],
            row["architecture"],
            str(row["K"]),
            str(row["C"]),
            f"{row['parameters'] / 1e6:.1f}M",
            row["license"] or "-",
            {True: "yes", False: "no", None: "-"}[row["cached"]],
            row["weights"] or "none",
        )
        for row in zoo_json()
    ]
    groups = [f"{name} = {' '.join(members)}" for name, members in GROUPS.items()]
    return "\n".join([_aligned(rows, right=(3, 4, 5)), "", *groups])


def ranking_table(ranking: "Ranking") -> str:
    """A ranking, best first; images/s is the speed of that teacher alone on this machine."""
    heads = "RANK TEACHER DIVERSITY SIMILARITY INTERVAL CENTRED 7x7 CORRESP. IMAGES IMAGES/S"
    rows = [tuple(heads.split())]
    for teacher in ranking.teachers:
        rate = ranking.rates.get(teacher.name)
        rows.append(
            (
                str(teacher.rank),
                teacher.name + _mark(teacher),
                f"{teacher.diversity:.4f}",
                f"{teacher.mean_similarity:.4f}",
                f"{teacher.ci_low:.4f}..{teacher.ci_high:.4f}",
                _number(teacher.centred_similarity),
                _number(teacher.similarity_7x7),
                _number(teacher.correspondence),
                f"{teacher.images:,}",
                f"{rate:,.1f}" if rate else "-",
            )
        )
    return _aligned(rows, right=(0, 2, 3, 4, 5, 6, 7, 8, 9))


def ranking_text(ranking: "Ranking", out: Path) -> str:
    """What `tokdiv rank` prints: the table, what to know about it, the files, and the winner last."""
    best = ranking[ranking.best_name]
    lines = [ranking_table(ranking), "", *ranking.remarks(), ranking.verdict()]
    lines.append(f"Written to {out}: ranking.json, ranking.csv, scores.parquet, skipped.csv")
    if (out / "report.html").is_file():
        lines.append(f"Report: {out / 'report.html'}")
    lines.append(f"Best teacher: {best.name} (diversity {best.diversity:.4f})")
    return "\n".join(lines)


def _mark(teacher: "RankedTeacher") -> str:
    if teacher.baseline:
        return " (baseline)"
    return " (noise-like)" if teacher.noise_like else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _aligned(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> str:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            c.rjust(w) if n in right else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
