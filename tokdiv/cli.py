"""The command line: parse, call, print. Torch is imported inside the commands, so that help comes at once."""

import contextlib
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokdiv import __version__
from tokdiv.errors import Interrupted, LostPeer, RunError, SharedError, UsageError

if TYPE_CHECKING:
    from tokdiv.ranking import Ranking
    from tokdiv.teachers.teacher import Teacher

app = typer.Typer(
    help="Rank frozen teachers for masked image modeling by the diversity of their tokens.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SPEC_HELP = (
    "A teacher: a name of the zoo (see `tokdiv teachers`), a group (paper), timm:MODEL, timm:ARCH@PATH, "
    "timm:ARCH@random, or FILE.toml; options follow as :key=value (blocks, norm, size, mean, std, or an argument "
    "of the architecture); LABEL= before it names it. Repeat it, or join several with commas."
)
Data = Annotated[
    str,
    typer.Argument(
        help="A folder of images, a .tar, WebDataset shards, or a data set in timm's notation "
        "(wds/..., hfds/..., torch/...)."
    ),
]
Teachers = Annotated[list[str], typer.Option("--teacher", "-t", metavar="SPEC", help=SPEC_HELP)]
OptionalTeachers = Annotated[
    list[str] | None, typer.Option("--teacher", "-t", metavar="SPEC", help=SPEC_HELP)
]
Run = Annotated[
    Path,
    typer.Option("--out", "-o", metavar="RUN", help="The folder to write, and to resume from."),
]
TeacherModule = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:FUNCTION",
        help="A network of your own: the function returns a tokdiv.Teacher. This runs your code.",
    ),
]
MaxImages = Annotated[
    int | None, typer.Option(help="Measure at most this many images. [default: all]")
]
BatchSize = Annotated[int, typer.Option(help="Images of one forward pass, per process.")]
AutoBatchSize = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        help="Images of one forward pass, per process; auto doubles it while that is faster.",
    ),
]
Workers = Annotated[
    int | None, typer.Option(help="Decoding threads per process. [default: one a core]")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[
    str, typer.Option(help="auto, float32 or bfloat16; auto is bfloat16 where it is native.")
]
Compile = Annotated[
    str,
    typer.Option(
        help="auto, on or off: torch.compile; auto for long runs (50,000 images a process)."
    ),
]
Seed = Annotated[int, typer.Option(help="Of the order of the images.")]
ImageSize = Annotated[
    str | None,
    typer.Option(
        help="Side of the view in pixels, or native for each teacher's own. [default: 224]"
    ),
]


def _version(asked: bool) -> None:
    if asked:
        print(f"tokdiv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def teachers(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the zoo: method, architecture, K and C at 224 px, parameters, weights, license, cached or not."""
    from tokdiv.tables import zoo_json, zoo_table

    print(json.dumps(zoo_json(), indent=2) if as_json else zoo_table())


@app.command()
def rank(
    data: Data,
    out: Run,
    teacher: OptionalTeachers = None,
    teacher_module: TeacherModule = None,
    max_images: MaxImages = None,
    confidence: Annotated[float, typer.Option(help="Of the order, between 0.5 and 1.")] = 0.99,
    certify: Annotated[
        str,
        typer.Option(
            help="order: stop once every pair is decided or tied. best: once the winner is, dropping certified "
            "losers on the way. none: measure all."
        ),
    ] = "order",
    tie: Annotated[
        float, typer.Option(help="A gap of mean similarity below this is a tie.")
    ] = 0.002,
    batch_size: AutoBatchSize = "auto",
    workers: Workers = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    compile: Compile = "auto",
    seed: Seed = 0,
    image_size: ImageSize = None,
    allow_baselines: Annotated[
        bool, typer.Option("--allow-baselines", help="Let pixels, hog and untrained networks win.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Go on with the RUN there, or move it to RUN.bak-N."
        ),
    ] = True,
) -> None:
    """Measure the token diversity of each teacher on DATA, rank them with a guarantee, write RUN."""
    import tokdiv

    ranking = tokdiv.rank(
        data,
        [*(teacher or []), *own_teacher(teacher_module)],
        out,
        resume=resume,
        max_images=max_images,
        confidence=confidence,
        certify=certify,
        tie=tie,
        batch_size=_batch_size(batch_size),
        workers=workers,
        device=device,
        dtype=dtype,
        compile=compile,
        seed=seed,
        image_size=_image_size(image_size),
        allow_baselines=allow_baselines,
    )
    if is_first_process():
        print(_ranking_text(ranking, out))
        if unusable := ranking.data["unusable"]:
            where = out / "skipped.csv"
            print(f"warning: unusable images skipped: {unusable:,} (see {where})", file=sys.stderr)


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder that `tokdiv rank` wrote.")
    ],
    device: Device = "auto",
) -> None:
    """Write RUN/report.html anew, and its figure: all that the ranking found, on one page without network."""
    from tokdiv.report.build import write_report

    print(write_report(run, device=device))


@app.command()
def maps(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Images, a row each.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="PNG", help="The picture: .png, .svg or .pdf.")
    ],
    teacher: OptionalTeachers = None,
    teacher_module: TeacherModule = None,
    query: Annotated[
        str | None,
        typer.Option(
            metavar="ROW,COL",
            help="The query: 7,3 is a patch of the finest grid (from 0), 0.5,0.25 a place in units of the view. "
            "[default: the center]",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    image_size: ImageSize = None,
) -> None:
    """Draw the cosine of every token to a query token, per image and teacher (Figure 3 of the paper)."""
    from tokdiv.maps import draw_maps

    draw_maps(
        images,
        [*(teacher or []), *own_teacher(teacher_module)],
        out,
        query=_query(query),
        device=device,
        dtype=dtype,
        image_size=_image_size(image_size),
    )
    print(out)


@app.command()
def depth(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="The folder to write.")],
    teacher: OptionalTeachers = None,
    max_images: Annotated[
        int | None, typer.Option(help="Measure at most this many images.")
    ] = 1000,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    image_size: ImageSize = None,
) -> None:
    """Token similarity by block depth: where a network over-smooths, and its most diverse block."""
    from tokdiv.depth import measure_depth

    table = measure_depth(
        data,
        teacher or [],
        out,
        max_images=max_images,
        batch_size=batch_size,
        workers=workers,
        device=device,
        dtype=dtype,
        seed=seed,
        image_size=_image_size(image_size),
    )
    print(table.to_string(index=False, float_format="{:.4f}".format))
    print(f"figure: {out / 'depth.png'}")


def own_teacher(module: str | None) -> "list[Teacher]":
    """The teacher of --teacher-module, if any."""
    if module is None:
        return []
    from tokdiv.teachers.load import teacher_from_file

    return [teacher_from_file(module)]


def _batch_size(text: str) -> Any:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch-size {text}: expected a number of images, as 64, or auto")
    return int(text)


def _image_size(text: str | None) -> Any:
    if text is None or text == "native":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--image-size {text}: expected a number of pixels, as 224, or native")
    return int(text)


def _query(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 2 and all(part.isdecimal() for part in parts):
        return int(parts[0]), int(parts[1])
    try:
        row, column = (float(part) for part in parts)
    except ValueError:
        raise UsageError(
            f"--query {text}: expected ROW,COL, as 7,3 (a patch) or 0.5,0.25 (a place in the view)"
        ) from None
    if not (0 <= row <= 1 and 0 <= column <= 1):
        raise UsageError(
            f"--query {text}: expected ROW,COL from 0 (top, left) to 1 (bottom, right)"
        )
    return row, column


def is_first_process() -> bool:
    """Whether this process prints what all of them know."""
    return int(os.environ.get("RANK", 0)) == 0


def _ranking_text(ranking: "Ranking", out: Path) -> str:
    """The table, what to know about it, and the winner last."""
    from tokdiv.tables import ranking_table

    lines = [ranking_table(ranking), "", *ranking.remarks()]
    lines.append(ranking.verdict())
    lines.append(f"Written to {out}: ranking.json, ranking.csv, scores.parquet, skipped.csv")
    if (out / "report.html").is_file():
        lines.append(f"Report: {out / 'report.html'}")
    best = ranking[ranking.best_name]
    lines.append(f"Best teacher: {best.name} (diversity {best.diversity:.4f})")
    return "\n".join(lines)


def main() -> None:
    """Run the command line; a mistake or a failure is one line on stderr, never a traceback."""
    sys.exit(run(app))


def run(application: typer.Typer) -> int:
    """Run a typer application; returns its exit code.

    0 done, 1 a run-time failure, 2 a mistake in the call, 130 and 143 interrupted by SIGINT and SIGTERM.
    """
    with _terminable():
        return _run(application)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the process with 143 where no command in progress handles it better."""

    def end(number: int, frame: Any) -> None:
        sys.exit(_fail("terminated", 128 + number, shared=True))

    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows handlers in the main thread alone
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(application: typer.Typer) -> int:
    try:
        code = application(standalone_mode=False)
        if code == 130:  # typer returns it from 0.29 on, and raised before
            return _fail("interrupted", 130)
        return code if isinstance(code, int) else 0
    except UsageError as error:
        return _fail(error, 2, shared=True)
    except LostPeer as error:
        from tokdiv.dist import first_to_report

        return _fail(error, 1) if first_to_report() else 1
    except SharedError as error:
        return _fail(error, 1, shared=True)
    except RunError as error:
        return _fail(error, 1)
    except Interrupted as error:
        from tokdiv.dist import EXIT_CODES

        return _fail(error, EXIT_CODES[signal.Signals(error.signal)], shared=True)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the reader of our output left
        return 1
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
            return 2
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):
            return _fail(_with_value(error), 2)  # click's own mistakes in the call
        if type(error).__name__ == "Abort":
            return _fail("interrupted", 130)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return _fail("out of memory: use a smaller --batch-size", 1)
        if isinstance(error, OSError):
            return _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1)
        raise


def _with_value(error: Any) -> str:
    """Click's message of a mistake, with the value that was given where it leaves it out."""
    message = str(error.format_message())
    for option in getattr(getattr(error, "param", None), "opts", ()):
        values = [value for given, value in itertools.pairwise(sys.argv) if given == option]
        if values and values[0] not in message:
            return f"{option} {values[0]}: {message}"
    return message


def _fail(message: object, code: int, shared: bool = False) -> int:
    """One line on stderr; of what all processes of a run know, only the first one speaks."""
    if shared and not is_first_process():
        return code
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return code
