"""The command line: parse, call, print, exit. Torch is imported inside the commands, so that help is instant."""

import contextlib
import io
import itertools
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokdiv import __version__
from tokdiv.config import Settings
from tokdiv.errors import (
    EXIT_CODES,
    Interrupted,
    LostPeer,
    RunError,
    SharedError,
    UsageError,
)
from tokdiv.settings import with_settings

if TYPE_CHECKING:
    from tokdiv.teachers.spec import TeacherSpec
    from tokdiv.teachers.teacher import Teacher


def make_app(command: str, help: str) -> typer.Typer:
    """An empty application with --help and --version."""
    application = typer.Typer(
        help=help,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show(asked: bool) -> None:
        if asked:
            print(f"{command} {__version__}")
            raise typer.Exit

    @application.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=show, is_eager=True, help="Show the version.")
        ] = False,
    ) -> None:
        pass

    return application


app = make_app(
    "tokdiv", "Rank frozen teachers for masked image modeling by the diversity of their tokens."
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
Teachers = Annotated[
    list[str] | None, typer.Option("--teacher", "-t", metavar="SPEC", help=SPEC_HELP)
]
TeacherModule = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:FUNCTION",
        help="A network of your own: the function returns a tokdiv.Teacher. This runs your code.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume/--no-resume", help="Resume the RUN there, or move it to RUN.bak-N."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]


@app.command()
def teachers(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the zoo: method, architecture, K and C at 224 px, parameters, weights, license, cached or not."""
    from tokdiv.tables import zoo_json, zoo_table

    print(json.dumps(zoo_json(), indent=2) if as_json else zoo_table())


@app.command()
@with_settings(Settings)
def rank(
    data: Data,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="RUN", help="The folder to write, and to resume from."),
    ],
    settings: dict[str, Any],
    teacher: Teachers = None,
    teacher_module: TeacherModule = None,
    resume: Resume = True,
) -> None:
    """Measure the token diversity of each teacher on DATA, rank them with a guarantee, write RUN."""
    import tokdiv

    ranking = tokdiv.rank(data, _teachers(teacher, teacher_module), out, resume=resume, **settings)
    if is_first_process():
        from tokdiv.tables import ranking_text

        print(ranking_text(ranking, out))


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder that `tokdiv rank` wrote.")
    ],
    device: Device = "auto",
) -> None:
    """Write RUN/report.html and RUN's figure again: the whole ranking on one page that needs no network."""
    from tokdiv.report.build import write_report

    print(write_report(run, device=device))


@app.command()
@with_settings(Settings, only=("device", "dtype", "image_size"))
def maps(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Images, a row each.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="PNG", help="The picture: .png, .svg or .pdf.")
    ],
    settings: dict[str, Any],
    teacher: Teachers = None,
    teacher_module: TeacherModule = None,
    query: Annotated[
        str | None,
        typer.Option(
            metavar="ROW,COL",
            help="The query token: 7,3 is a patch of the finest grid (from 0), 0.5,0.25 a point in units of the "
            "view. [default: the center]",
        ),
    ] = None,
) -> None:
    """Draw the cosine of every token to a query token, per image and teacher (Figure 3 of the paper)."""
    from tokdiv.maps import draw_maps, parse_query

    at = None if query is None else parse_query(query)
    print(draw_maps(images, _teachers(teacher, teacher_module), out, query=at, **settings))


@app.command()
@with_settings(
    Settings,
    only=("max_images", "batch_size", "workers", "device", "dtype", "seed", "image_size"),
    max_images=1000,
    batch_size=64,
)
def depth(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="The folder to write.")],
    settings: dict[str, Any],
    teacher: Teachers = None,
) -> None:
    """Token similarity by block depth: where a network over-smooths, and its most diverse block."""
    from tokdiv.depth import measure_depth

    table = measure_depth(data, teacher or [], out, **settings)
    print(table.to_string(index=False, float_format="{:.4f}".format))
    print(f"figure: {out / 'depth.png'}")


def _teachers(specs: list[str] | None, module: str | None) -> "list[str | TeacherSpec | Teacher]":
    return [*(specs or []), *own_teacher(module)]


def own_teacher(module: str | None) -> "list[Teacher]":
    """The teacher of --teacher-module, if any."""
    if module is None:
        return []
    from tokdiv.teachers.load import teacher_from_file

    return [teacher_from_file(module)]


def is_first_process() -> bool:
    """Whether this process prints what all of them know."""
    return int(os.environ.get("RANK", 0)) == 0


def main() -> None:
    """Run the command line; a mistake or a failure is one line on stderr, never a traceback."""
    sys.exit(run(app))


def run(application: typer.Typer) -> int:
    """Run a typer application with messages on stderr; returns its exit code.

    0 done, 1 a run-time failure, 2 a mistake in the call, 130 and 143 interrupted by SIGINT and SIGTERM.
    """
    # An ASCII terminal, or a path that is no UTF-8, must not end a run that is done.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with _messages(), _signals_end():
        try:
            code = application(standalone_mode=False)
        except BaseException as error:
            failed = _exit_code(error)
            if failed is None:
                raise
            return failed
        if code == 130:  # typer returns it from 0.29 on, and raised before
            return _fail("interrupted", 130)
        return code if isinstance(code, int) else 0


class _Messages(logging.Handler):
    """Log messages as plain lines on stderr, above a progress bar; those of the first process only."""

    def emit(self, record: logging.LogRecord) -> None:
        if not is_first_process():
            return
        from tqdm.std import tqdm

        text = " ".join(record.getMessage().split("\n"))
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    handler = _Messages()
    loggers = [logging.getLogger(name) for name in ("tokdiv", "img2vec")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


@contextlib.contextmanager
def _signals_end() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end the process with their exit code where no command handles them itself."""

    def end(number: int, frame: Any) -> None:
        sys.exit(_fail("terminated", EXIT_CODES[number], shared=True))

    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows handlers in the main thread only
        return
    numbers = [number for number in EXIT_CODES if number != signal.SIGINT]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(error: BaseException) -> int | None:
    """The exit code for what ended a command, after one line about it; None for a fault of the program itself."""
    name = type(error).__name__  # of modules that are not imported for the sake of a name
    if isinstance(error, UsageError):
        return _fail(error, 2, shared=True)
    if isinstance(error, LostPeer):
        from tokdiv.dist import first_to_report

        return _fail(error, 1) if first_to_report() else 1
    if isinstance(error, RunError):
        return _fail(error, 1, shared=isinstance(error, SharedError))
    if isinstance(error, Interrupted):
        return _fail(error, error.exit_code, shared=True)
    if isinstance(error, KeyboardInterrupt) or name == "Abort":
        return _fail("interrupted", 130)
    if isinstance(error, BrokenPipeError):  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if name == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
        return 2
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):
        return _fail(_with_value(error), 2)  # click's own mistakes in the call
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return _fail("out of memory: use a smaller --batch-size", 1)
    if isinstance(error, OSError):
        return _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1)
    return None


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
