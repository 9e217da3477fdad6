"""The command line: parse, call, print. Torch is imported inside the commands, so that help comes at once."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from img2vec.config import PRESETS, Config
from img2vec.evaluate.segment_settings import SegmentSettings
from img2vec.evaluate.settings import DetectSettings, FinetuneSettings, KnnSettings, ProbeSettings
from tokdiv.cli import (
    Data,
    TeacherModule,
    is_first_process,
    make_app,
    own_teacher,
    run,
)
from tokdiv.errors import UsageError
from tokdiv.settings import with_settings

app = make_app(
    "img2vec",
    "Pretrain a ViT student with a frozen teacher's tokens (Img2Vec, arXiv 2304.12535), evaluate it and export it "
    "to timm.",
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run of `img2vec pretrain`, one of its checkpoints, an exported folder, or any SPEC.",
    ),
]
Train = Annotated[str, typer.Option(metavar="DATA", help="Training images, with classes.")]
Val = Annotated[str, typer.Option(metavar="DATA", help="Validation images, with classes.")]
SEG_HELP = (
    "{} images with masks: FOLDER with images/ and annotations/, torch/VOCSegmentation:root=FOLDER, "
    "torch/Cityscapes:root=FOLDER or hfds/NAME. Options follow: :split=NAME, :ignore=255, "
    ":reduce_zero_label=true, :classes=FILE."
)
COCO_HELP = "{} images with objects: IMAGES_FOLDER:annotations=FILE.json."
Results = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Folder for results.json and results.csv."),
]


@app.command("pretrain")
@with_settings(Config, optional=True, leave_out=("student_args", "mean", "std", "crop_scale"))
def pretrain_command(
    data: Data,
    settings: dict[str, Any],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="OUT", help="The folder to write, and to resume.")
    ],
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            "-t",
            metavar="SPEC_or_RUN",
            help="A teacher (see `tokdiv teachers`), or the folder of a ranking, which means its winner.",
        ),
    ] = None,
    teacher_module: TeacherModule = None,
    preset: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(PRESETS)}. [default: vit_base]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Settings over the preset's.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Go on where OUT stands, or move it to OUT.bak-N first."
        ),
    ] = True,
) -> None:
    """Pretrain a student; what is not given comes from --config, then from --preset."""
    if (teacher is None) == (teacher_module is None):
        raise UsageError(
            f"{'no teacher' if teacher is None else 'two teachers'} given: expected either --teacher "
            f"SPEC_or_RUN, or --teacher-module FILE.py:FUNCTION for a network of your own"
        )
    from img2vec.train import pretrain

    given = teacher if teacher is not None else own_teacher(teacher_module)[0]
    result = pretrain(data, given, out, preset=preset, config=config, resume=resume, **settings)
    if is_first_process():
        loss = "" if result.loss is None else f", loss {result.loss:.4f}"
        print(f"Done: step {result.step}, epoch {result.epoch}{loss}")
        print(f"Student: {result.student}")
        print(f'Load it: timm.create_model("local-dir:{result.student}", pretrained=True)')


@app.command()
@with_settings(KnnSettings)
def knn(
    model: Model, train: Train, val: Val, settings: dict[str, Any], out: Results = None
) -> None:
    """Weighted k-nearest-neighbor accuracy of frozen features, as in DINO."""
    from img2vec import evaluate

    settings["k"] = _numbers("--k", settings["k"])
    _print_results(evaluate.knn, settings, model, train, val, out)


@app.command()
@with_settings(ProbeSettings)
def probe(
    model: Model, train: Train, val: Val, settings: dict[str, Any], out: Results = None
) -> None:
    """Accuracy of a linear classifier on frozen features, as in MAE."""
    from img2vec import evaluate

    _print_results(evaluate.probe, settings, model, train, val, out)


@app.command()
@with_settings(FinetuneSettings)
def finetune(
    model: Model, train: Train, val: Val, settings: dict[str, Any], out: Results = None
) -> None:
    """Accuracy after training the whole network with labels, as in MAE."""
    from img2vec import evaluate

    _print_results(evaluate.finetune, settings, model, train, val, out)


@app.command()
@with_settings(SegmentSettings)
def segment(
    model: Model,
    train: Annotated[str, typer.Option(metavar="SEG", help=SEG_HELP.format("Training"))],
    val: Annotated[str, typer.Option(metavar="SEG", help=SEG_HELP.format("Validation"))],
    settings: dict[str, Any],
    out: Results = None,
) -> None:
    """Mean IoU of segmentation: a linear layer or nearest neighbors on frozen tokens, or UPerNet, fine-tuned."""
    from img2vec import evaluate

    _print_results(evaluate.segment, settings, model, train, val, out)


@app.command()
@with_settings(DetectSettings)
def detect(
    model: Model,
    train: Annotated[str, typer.Option(metavar="COCO", help=COCO_HELP.format("Training"))],
    val: Annotated[str, typer.Option(metavar="COCO", help=COCO_HELP.format("Validation"))],
    settings: dict[str, Any],
    out: Results = None,
) -> None:
    """Average precision of boxes and masks after training a Mask R-CNN, as in ViTDet."""
    from img2vec import evaluate

    _print_results(evaluate.detect, settings, model, train, val, out)


@app.command("export")
def export_command(
    source: Annotated[
        Path, typer.Argument(metavar="OUT_or_CKPT", help="A run, or one of its checkpoints.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")],
) -> None:
    """Write a student as a folder that timm.create_model("local-dir:DIR", pretrained=True) loads."""
    from img2vec.export import export

    folder = export(source, out)
    print(f'Load it: timm.create_model("local-dir:{folder}", pretrained=True)')


def _print_results(task: Any, settings: dict[str, Any], *arguments: Any) -> None:
    """Run an evaluation on all processes, and print its table once."""
    from tokdiv.dist import processes

    with processes(settings["device"]) as group:
        results = task(*arguments, **settings)
        if group.rank == 0:
            print(results.table())


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"{option} {text}: expected whole numbers joined with commas, as 10,20"
        ) from None


def main() -> None:
    """Run the command line; a mistake or a failure is one line on stderr, never a traceback."""
    sys.exit(run(app))
