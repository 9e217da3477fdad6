"""RUN/report.html: what a ranking found, on one page that needs nothing else, and RUN's figure.

All of it comes from RUN: the ranking says what is certain, the scores how it came about. Only the similarity
maps need DATA and the teachers once more; where those are not on this machine, the page says so and does without.
"""

import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup
from numpy.typing import NDArray

from tokdiv.certify import OrderCertifier, look_schedule
from tokdiv.data.loader import Source, decode_image, permutation
from tokdiv.data.open import open_source
from tokdiv.dist import choose_device
from tokdiv.errors import RunError, UsageError
from tokdiv.figures.evidence import evidence_figure
from tokdiv.figures.maps import lowest_cosine, maps_figure
from tokdiv.figures.similarity import similarity_figure
from tokdiv.figures.style import save_figure, teacher_colors
from tokdiv.maps import Maps, measure_maps
from tokdiv.ranking import RankedTeacher, Ranking, load_ranking
from tokdiv.report.page import (
    NARROW,
    SKIPPED,
    given_command,
    inline_figure,
    read_skipped,
    render,
    repeat_command,
)
from tokdiv.scores import write_whole
from tokdiv.teachers.cache import is_cached
from tokdiv.teachers.load import load_teacher
from tokdiv.teachers.teacher import Teacher

FILES = ("report.html", "similarity.png", "similarity.svg")  # what is written into RUN
MAPPED = 10  # at most so many teachers have their maps on the page, the first of the ranking
MAPS_ABREAST = 5  # teachers of one figure of maps
OPEN_PAIRS = 10  # at most so many remarks on pairs that are not decided
# timm's ResNets and RegNets whose stages end in a ReLU; those called 33ts, 61q and the like end in a SiLU.
RELU_STAGES = re.compile(
    r"(test_|wide_|legacy_)?(se|eca|sk)?(resnet|resnext|res2net|res2next|resnest)"
    r"(aa|blur|rs|light)?(?!v2|\d+ts|\d+q)|legacy_senet|regnet[xy]_"
)
RELU_AT_THE_END = re.compile(
    r"(rep)?vgg|densenet|dla|hrnet"
)  # of which this is known of the end alone
NO_INDEX = "a stream of shards has no index by which to find single images again"


def write_report(
    run: str | os.PathLike[str],
    ranking: Ranking | None = None,
    *,
    source: Source | None = None,
    teachers: Sequence[Teacher] | None = None,
    device: str = "auto",
) -> Path:
    """Write RUN/report.html, RUN/similarity.png and RUN/similarity.svg.

    Args:
        run: the folder that `tokdiv rank` wrote.
        ranking, source, teachers: what `tokdiv.rank` has in its hands at its end; by default all is
            loaded from what RUN names. Nothing is downloaded for it: without DATA or weights that
            are not on this machine, the page has no maps, or none of that teacher.
        device: where teachers that are loaded here compute their maps.

    Raises:
        UsageError: no finished RUN, or its scores are gone or those of another ranking.
        RunError: the disk is full or not writable.
    """
    folder = Path(run)
    ranking = ranking or load_ranking(folder)
    scores = _read_scores(folder, ranking)
    names = [teacher.name for teacher in ranking.teachers]
    colors = teacher_colors(names)

    def similarity(width: float) -> Any:
        return similarity_figure(
            names,
            scores.values,
            [teacher.ci_low for teacher in ranking.teachers],
            [teacher.ci_high for teacher in ranking.teachers],
            [teacher.baseline for teacher in ranking.teachers],
            best=ranking.best_name,
            colors=colors,
            confidence=ranking.settings["confidence"],
            width=width,
        )

    figure = similarity(6.5)
    for name in FILES[1:]:
        try:
            save_figure(figure, folder / name)
        except OSError as error:
            raise RunError(f"cannot write '{folder / name}': {error.strerror}") from None
    means = ", ".join(f"{t.name} {t.mean_similarity:.4f}" for t in ranking.teachers)
    evidence = _evidence(ranking, scores) if len(names) > 1 else None
    maps, without_maps = _maps(ranking, scores, source, teachers, device, colors)
    config = _read_config(folder)
    skipped = read_skipped(folder / "skipped.csv")
    page = render(
        "ranking.html",
        ranking=ranking,
        best=ranking[ranking.best_name],
        lead=_lead(ranking),
        colors=colors,
        labels={t.name: _label(t, ranking.best_name) for t in ranking.teachers},
        confidence=f"{100 * ranking.settings['confidence']:.6g}%",
        similarity=inline_figure(
            figure,
            f"Distribution of the token similarity of each image and mean with interval, by teacher: {means}.",
            "Each row: how the token similarity of the images is distributed, and its mean with the interval. "
            "Further left is more diverse.",
            narrow=similarity(NARROW),
        ),
        matrix=_matrix(ranking, evidence) if evidence else [],
        evidence=_evidence_picture(ranking, evidence, colors) if evidence else None,
        open_pairs=OPEN_PAIRS,
        maps=maps,
        without_maps=without_maps,
        caveats=_caveats(ranking),
        skipped=skipped[:SKIPPED],
        num_skipped=len(skipped),
        settings=ranking.settings,
        versions=config.get("versions", {}),
        repeat=_repeat(folder, ranking, config),
        pretrain=_pretrain(folder, ranking, config),
    )
    # A name that is no Unicode is shown with its bytes spelled out.
    write_whole(folder / FILES[0], page.encode("utf-8", "backslashreplace"))
    return folder / FILES[0]


@dataclass(frozen=True)
class _Scores:
    """What scores.parquet holds, for n usable images and the T teachers of the ranking in its order.

    positions: (n,) places in the order of the run, ascending. keys: n names. values: (n, T) float32, NaN
    where a dropped teacher was not measured.
    """

    positions: NDArray[np.int64]
    keys: pa.ChunkedArray
    values: NDArray[np.float32]


def _read_scores(folder: Path, ranking: Ranking) -> _Scores:
    path = folder / "scores.parquet"
    try:
        table = pq.read_table(path)
        columns = [table.column(teacher.name).to_numpy() for teacher in ranking.teachers]
        values = np.stack(columns, axis=1).astype(np.float32, copy=False)
        positions, keys = table.column("position").to_numpy(), table.column("key")
    except FileNotFoundError:
        raise UsageError(f"'{path}': no such file; repeat the `tokdiv rank` command") from None
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(
            f"'{path}' does not hold the scores of this ranking ({reason}); repeat the `tokdiv rank` command"
        ) from None
    if len(positions) != ranking.data["images"] - ranking.data["unusable"]:
        raise UsageError(
            f"'{path}' holds {len(positions):,} images, the ranking was made of "
            f"{ranking.data['images'] - ranking.data['unusable']:,}; repeat the `tokdiv rank` command"
        )
    return _Scores(positions, keys, values)


def _read_config(folder: Path) -> dict[str, Any]:
    """How the run was made; nothing where the file is gone or damaged, as the result does not need it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _label(teacher: RankedTeacher, best: str) -> str:
    """A name with what it is, in words and not by its style alone."""
    marks = [*(["best"] if teacher.name == best else []), *(["baseline"] * teacher.baseline)]
    return f"{teacher.name} ({', '.join(marks)})" if marks else teacher.name


def _lead(ranking: Ranking) -> str:
    """By how much the winner leads, in a sentence."""
    best, other = ranking[ranking.best_name], ranking.next_best
    if other is None:
        return (
            "There is nothing to compare it with: no other candidate is a trained teacher."
            if len(ranking.teachers) > 1
            else "There is nothing to compare it with: it is the only candidate."
        )
    pair = ranking.pair(best.name, other.name)
    percent = f"{100 * ranking.settings['confidence']:.6g}%"
    interval = f"{percent} interval {_signed(pair['low'])} to {_signed(pair['high'])}"
    if pair["low"] == pair["high"]:
        interval = "measured on every image, so exact"
    gap = f"The next, {other.name}, has a mean similarity {abs(pair['gap']):.4f} "
    gap += f"{'higher' if pair['gap'] >= 0 else 'lower'} ({interval})"
    if (best.name, other.name) in ranking.decided():
        return f"{gap}: certified to be less diverse."
    if pair["state"] == "tie":
        return f"{gap}: a tie, as the gap is certified to be below {ranking.settings['tie']:g}."
    return f"{gap}: not decided."


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class _Evidence:
    """How the certificate came about.

    images: (m,) counts at which was looked. values: (m, P) log10 of the e-value of each pair, NaN once it was
    no longer followed. decided: of each pair, the count at which it was first seen to be decided, or None.
    """

    images: NDArray[np.int64]
    pairs: list[tuple[str, str]]
    values: NDArray[np.float64]
    decided: list[int | None]


def _evidence(ranking: Ranking, scores: _Scores) -> _Evidence:
    """The certificate's evidence at each look of the run, from its scores: the same test once more."""
    names = [teacher.name for teacher in ranking.teachers]
    num_images = ranking.data["images"]
    values = np.full((num_images, len(names)), np.nan, np.float32)
    values[scores.positions] = scores.values
    certifier = OrderCertifier(
        len(names),
        ranking.data["count"],
        delta=1 - ranking.settings["confidence"],
        tie=ranking.settings["tie"],
        lower=-1 / (min(teacher.spec.num_tokens for teacher in ranking.teachers) - 1),
        upper=1.0,
    )
    looks = look_schedule(num_images)
    columns = list(combinations(range(len(names)), 2))
    evidence = np.full((len(looks), len(columns)), np.nan)
    decided: list[int | None] = [None] * len(columns)
    seen = 0
    for row, look in enumerate(looks.tolist()):
        certifier.update(values[seen:look])
        seen = look
        for pair in certifier.certificate().pairs:
            column = columns.index((min(pair.first, pair.second), max(pair.first, pair.second)))
            if pair.state == "decided" and decided[column] is None:
                decided[column] = look
            if certifier.measured[[pair.first, pair.second]].all():
                evidence[row, column] = pair.evidence
    pairs = [(names[n], names[m]) for n, m in columns]
    return _Evidence(looks, pairs, evidence, decided)


def _threshold(ranking: Ranking) -> float:
    """The evidence from which a pair is decided."""
    return len(ranking.certificate["pairs"]) / (1 - ranking.settings["confidence"])


def _evidence_picture(ranking: Ranking, evidence: _Evidence, colors: dict[str, str]) -> Markup:
    found = [ranking.pair(first, second) for first, second in evidence.pairs]
    with np.errstate(over="ignore"):
        values = 10.0**evidence.values
    threshold = _threshold(ranking)

    def draw(width: float) -> Any:
        return evidence_figure(
            evidence.images,
            values,
            [f"{pair['first']} < {pair['second']}" for pair in found],
            threshold,
            tied=[pair["state"] == "tie" for pair in found],
            colors=colors,
            width=width,
        )

    said = [
        f"{pair['first']} before {pair['second']} "
        + (f"decided within {count:,} images" if count else pair["state"])
        for pair, count in zip(found[:20], evidence.decided)
    ]
    return inline_figure(
        draw(6.5),
        f"Evidence for the order of each pair against the images seen: {'; '.join(said)}.",
        f"The most that a bet against equal means has grown to. A pair is decided from {threshold:,.4g} on: "
        f"the number of pairs over the probability of error. A line has the color of the more diverse teacher, "
        f"its mark is filled with that of the other.",
        narrow=draw(NARROW),
    )


def _matrix(ranking: Ranking, evidence: _Evidence) -> list[list[dict[str, Any] | None]]:
    """A row a teacher, a column a teacher, best first: what is known of each pair above the diagonal."""
    implied = ranking.decided()
    reached = {frozenset(pair): count for pair, count in zip(evidence.pairs, evidence.decided)}
    rows: list[list[dict[str, Any] | None]] = []
    for n, first in enumerate(ranking.teachers):
        row: list[dict[str, Any] | None] = [None] * len(ranking.teachers)
        for m, second in enumerate(ranking.teachers[n + 1 :], start=n + 1):
            pair = ranking.pair(first.name, second.name)
            follows = pair["state"] == "open" and (first.name, second.name) in implied
            row[m] = {
                "state": pair["state"],
                "said": "follows" if follows else pair["state"],
                "gap": _signed(pair["gap"]),
                "low": _signed(pair["low"]),
                "high": _signed(pair["high"]),
                "images": pair["images"],
                "reached": reached[frozenset((first.name, second.name))],
            }
        rows.append(row)
    return rows


def _maps(
    ranking: Ranking,
    scores: _Scores,
    source: Source | None,
    teachers: Sequence[Teacher] | None,
    device: str,
    colors: dict[str, str],
) -> tuple[dict[str, Any] | None, str]:
    """Similarity maps of a few images, ready for the page, or None; and what is left out, and why."""
    try:
        rows = _spread(scores.values[:, _place(ranking, ranking.best_name)])
        pictures = _read_images(ranking, scores, rows, source)
        loaded, without = _load(ranking, teachers, device)
        place = loaded[0].mean.device
        found = measure_maps(pictures, loaded, place)
    except (UsageError, RunError) as error:
        return None, f"The page has no similarity maps: {error}."
    except Exception as error:  # of a user's own module, of a device: the page goes without
        reason = str(error).strip().split("\n")[0]
        return None, f"The page has no similarity maps: {type(error).__name__}: {reason}"
    chosen = []
    for row, title in rows.items():
        key = str(scores.keys[row])
        value = float(scores.values[row, _place(ranking, ranking.best_name)])
        chosen.append({"title": title, "key": key, "similarity": value})
    figures = _draw_maps(found, [teacher.name for teacher in loaded], chosen, colors)
    return {"chosen": chosen, "figures": figures}, without


def _place(ranking: Ranking, name: str) -> int:
    return next(n for n, teacher in enumerate(ranking.teachers) if teacher.name == name)


def _spread(similarity: NDArray[np.float32]) -> dict[int, str]:
    """Rows of the images that show how far a teacher's similarity ranges; fewer where there are fewer."""
    measured = np.flatnonzero(~np.isnan(similarity))
    order = measured[np.argsort(similarity[measured], kind="stable")]
    if len(order) == 1:
        return {int(order[0]): "the only one"}
    rows = {int(order[0]): "lowest"}
    if len(order) > 2:
        rows[int(order[(len(order) - 1) // 2])] = "median"
    return rows | {int(order[-1]): "highest"}


def _read_images(
    ranking: Ranking, scores: _Scores, rows: dict[int, str], source: Source | None
) -> list[Any]:
    """The decoded images of some rows of the scores.

    Raises:
        UsageError: DATA is not there any more, is another, or cannot be read image by image.
    """
    source = source or _open_again(ranking.data["source"])
    if not source.permutable or source.count is None:
        raise UsageError(NO_INDEX)
    if source.fingerprint != ranking.data["fingerprint"]:
        raise UsageError(f"'{source.name}' holds other images now than when it was ranked")
    order = permutation(source.count, ranking.settings["seed"])
    return [decode_image(source.read(int(order[scores.positions[row]]))) for row in rows]


def _open_again(data: str) -> Source:
    """DATA of the run.

    Raises:
        UsageError: it is not there any more, is a stream, or might have to be downloaded.
    """
    scheme, _, rest = data.partition("/")
    if not os.path.lexists(os.path.expanduser(data)):
        if scheme.lower() in ("wds", "tfds", "hfids"):
            raise UsageError(NO_INDEX)
        folder = os.path.expanduser(re.split(":(?:split|root)=", rest)[0])
        # A page is no reason to fetch gigabytes.
        if scheme.lower() == "hfds" and not os.path.isdir(folder):
            raise UsageError(
                f"'{data}' is not downloaded for a page; the same `tokdiv rank` command again draws them"
            )
    return open_source(data)


def _load(
    ranking: Ranking, teachers: Sequence[Teacher] | None, device: str
) -> tuple[list[Teacher], str]:
    """The teachers whose maps are drawn, best first, and a sentence on those that are left out."""
    wanted = ranking.teachers[:MAPPED]
    if ranking.best_name not in [teacher.name for teacher in wanted]:
        wanted = [*wanted[:-1], ranking[ranking.best_name]]
    said = ""
    if len(ranking.teachers) > len(wanted):
        said = f"Maps of {len(wanted)} of the {len(ranking.teachers)} teachers. "
    if teachers is not None:
        given = {teacher.name: teacher for teacher in teachers}
        return [given[teacher.name] for teacher in wanted], said.strip()
    loaded, place = [], choose_device(device)
    for teacher in wanted:
        try:
            loaded.append(_load_again(teacher, str(place)))
        except (UsageError, RunError) as error:
            said += f"Without {teacher.name}: {error}. "
    if not loaded:
        raise UsageError(f"no teacher can be loaded again. {said.strip()}".rstrip("."))
    return loaded, said.strip()


def _load_again(teacher: RankedTeacher, device: str) -> Teacher:
    """As it was measured.

    Raises:
        UsageError: it needs code of the user's own, or its weights are not on this machine.
        RunError: the weights changed.
    """
    weights = teacher.spec.weights or ""
    if teacher.spec.is_custom:
        raise UsageError("it is a module of the user's own, which RUN cannot load again")
    # A page is no reason to fetch gigabytes.
    if weights.startswith(("http://", "https://", "hf-hub:")) and not is_cached(weights):
        raise UsageError(f"its weights, {weights}, are not on this machine")
    return load_teacher(teacher.spec, device=device, dtype=teacher.dtype)


def _draw_maps(
    found: Maps, names: list[str], chosen: list[dict[str, Any]], colors: dict[str, str]
) -> list[Markup]:
    """A figure for every few teachers, all on one scale."""
    lowest = lowest_cosine(found.maps)
    figures = []
    for start in range(0, len(names), MAPS_ABREAST):
        part = slice(start, start + MAPS_ABREAST)
        figure = maps_figure(
            found.views,
            names[part],
            [row[part] for row in found.maps],
            found.rectangles,
            [row[part] for row in found.similarities],
            tokens=[row[part] for row in found.tokens],
            colors=colors,
            lowest=lowest,
        )
        images = ", ".join(f"{image['key']} ({image['title']})" for image in chosen)
        alt = (
            f"Cosine of every token to the query token outlined in red, for {', '.join(names[part])}. "
            f"The images from top to bottom: {images}."
        )
        figures.append(inline_figure(figure, alt, image_format="png"))
    return figures


def _caveats(ranking: Ranking) -> list[tuple[str, str]]:
    """What to weigh before trusting the order: a heading and what it comes to here."""
    teachers, best = ranking.teachers, ranking[ranking.best_name]
    rectified = [t for t in teachers if _ends_in_relu(t)]
    floor = (
        "Tokens that come out of a ReLU have no negative component, so even independent ones have a cosine of "
        "about 1/π = 0.318, where those of other networks have 0."
    )
    if rectified:
        values = ", ".join(
            f"{t.name} ({t.mean_similarity:.4f}"
            + (
                f", centred {t.centred_similarity:.4f})"
                if t.centred_similarity is not None
                else ")"
            )
            for t in rectified
        )
        floor += (
            f" Here this concerns {values}: their similarity overstates how alike the tokens are."
        )
    else:
        floor += " None of the candidates is known to end in one, by the name of its architecture."
    caveats = [("Floor of a ReLU", floor)]

    counts = {t.spec.num_tokens for t in teachers}
    tokens = ", ".join(f"{t.name} {t.spec.num_tokens}" for t in teachers)
    if len(counts) == 1:
        said = f"Every candidate has {best.spec.num_tokens} tokens an image, so their number favors none."
    else:
        said = (
            f"The candidates differ in it ({tokens}), and the number of tokens moves the similarity by itself: "
            f"neighbors on a finer grid are more alike. The 7x7 column compares on a common grid."
        )
    caveats.append(("Number of tokens", said))
    for column, title, what, without in (
        (
            "centred_similarity",
            "Centred at the mean token",
            "With each teacher's mean token taken away, which removes an offset that all of its tokens share,",
            "it takes the mean token of the first 256 images, and is measured on those after them",
        ),
        (
            "similarity_7x7",
            "Pooled to a 7x7 grid",
            "With the tokens of each teacher pooled to a 7x7 grid,",
            "it needs a grid of 7x7 tokens or more",
        ),
    ):
        caveats.append((title, _other_order(ranking, column, what, without)))

    above = [t for t in teachers if t.baseline and t.rank < best.rank]
    if above:
        values = ", ".join(
            f"{t.name} (diversity {t.diversity:.4f}, the winner's {best.diversity:.4f})"
            for t in above
        )
        said = (
            f"Above the winner: {values}. They are not chosen, as raw signals and untrained networks are diverse "
            f"without meaning: token diversity ranks trained teachers, it does not make one."
        )
    elif best.baseline:
        said = "The winner itself is a baseline: diverse, but nothing has been learned in it."
    elif any(t.baseline for t in teachers):
        said = "None of those measured stands above the winner."
    else:
        said = "None was measured: add -t pixels,hog to see where they stand."
    caveats.append(("Baselines", said))
    caveats.append(
        (
            "A published doubt",
            "That diverse tokens make a good teacher is a finding of one paper (Img2Vec, arXiv 2304.12535). dBOT "
            "(arXiv 2209.03917) finds that the choice of the teacher matters less at equal data and architecture, "
            "and hardly at all when each student in turn becomes the teacher of the next; Hybrid Distill (arXiv "
            "2306.15876) looks at the diversity of attention heads instead. A ranking says whose tokens are the "
            "more diverse; which student is the better one, only pretraining says.",
        )
    )
    return caveats


def _ends_in_relu(teacher: RankedTeacher) -> bool:
    """Whether its tokens are known to come out of a ReLU, by the name that timm gives the architecture."""
    spec = teacher.spec
    name = spec.architecture.lower()
    if spec.norm:  # a norm behind it makes them negative again
        return False
    if RELU_STAGES.match(name):
        return True
    return spec.block is None and RELU_AT_THE_END.match(name) is not None


def _other_order(ranking: Ranking, column: str, what: str, without: str) -> str:
    """Whether another measure would put the trained teachers in another order."""
    order = ranking.order_by(column)
    trained = [t.name for t in ranking.teachers if not t.baseline]
    absent = [name for name in trained if name not in order]
    if len(order) < 2:
        said = f"Too few values to order trained teachers by this column: {without}."
        return said if len(trained) > 1 else "There are no two trained teachers to order by it."
    here = [name for name in trained if name in order]
    values = ", ".join(f"{name} {getattr(ranking[name], column):.4f}" for name in order)
    if order == here:
        said = f"{what} the order of the trained teachers stays as it is ({values})."
    elif order[0] == here[0]:
        said = f"{what} the winner stays, the order of the trained teachers behind it changes ({values})."
    else:
        said = f"{what} {order[0]} would come first: the order would change ({values})."
    return said + (f" Without {', '.join(absent)}: {without}." if absent else "")


def _repeat(folder: Path, ranking: Ranking, config: dict[str, Any]) -> dict[str, str]:
    """How to measure the same again: the command line that was given, or the call from Python."""
    if (given := repeat_command(config, "tokdiv")) is not None:
        return given
    chosen = {
        key: value
        for key, value in ranking.settings.items()
        if value is not None and key not in ("device", "workers", "compile")
    }
    options = "".join(f",\n    {key}={value!r}" for key, value in chosen.items())
    said = "From Python, as the run was started."
    if any(teacher.spec.is_custom for teacher in ranking.teachers):
        said += " Modules of your own must be made by your code and take the place of their specs."
    return {
        "said": said,
        "text": f"import tokdiv\n\nbefore = tokdiv.load_ranking({str(folder)!r})\n"
        f"tokdiv.rank(\n    {ranking.data['source']!r},\n    [teacher.spec for teacher in before.teachers],\n"
        f"    {str(folder) + '-again'!r}{options},\n)",
    }


def _pretrain(folder: Path, ranking: Ranking, config: dict[str, Any]) -> dict[str, str]:
    """How to pretrain with the winner."""
    data = ranking.data["source"]
    if ranking.best.is_custom:
        if module := _teacher_module(given_command(config, "tokdiv")):
            words = ["img2vec", "pretrain", data, "--teacher-module", module, "-o", "runs/pretrain"]
            return {
                "said": "The winner is made by your own code, which is run again. Relative paths hold from the "
                "folder where the ranking was started.",
                "text": shlex.join(words),
            }
        return {
            "said": f"{ranking.best_name} is a module of your own: hand the Teacher itself over, from Python.",
            "text": f"import img2vec\n\nimg2vec.pretrain({data!r}, teacher=teacher, out='runs/pretrain')",
        }
    words = ["img2vec", "pretrain", data, "--teacher", str(folder), "-o", "runs/pretrain"]
    return {"said": "RUN stands for its winner.", "text": shlex.join(words)}


def _teacher_module(words: list[str]) -> str | None:
    """FILE.py:FUNCTION of a command line, the last where there are several."""
    option, found = "--teacher-module", None
    for word, following in zip(words, [*words[1:], ""]):
        if word == option:
            found = following
        elif word.startswith(option + "="):
            found = word[len(option) + 1 :]
    return found or None
