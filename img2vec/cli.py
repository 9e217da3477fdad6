"""The command line: parse, call, print. Torch is imported inside the commands, so that help comes at once."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from img2vec.config import PRESETS
from img2vec.evaluate.settings import DetectSettings, FinetuneSettings, KnnSettings, ProbeSettings
from tokdiv import __version__
from tokdiv.cli import TeacherModule, own_teacher
from tokdiv.errors import UsageError
from tokdiv.settings import with_settings

app = typer.Typer(
    help="Pretrain a ViT student with a frozen teacher's tokens (Img2Vec, arXiv 2304.12535), evaluate "
    "it and export it to timm.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Data = Annotated[
    str,
    typer.Argument(
        help="A folder of images, a .tar, WebDataset shards, or a data set in timm's notation "
        "(wds/..., hfds/..., torch/...)."
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run of `img2vec pretrain`, one of its checkpoints, an exported folder, or any SPEC.",
    ),
]
Train = Annotated[str, typer.Option(metavar="DATA", help="Training images, with classes.")]
Val = Annotated[str, typer.Option(metavar="DATA", help="Validation images, with classes.")]
COCO_HELP = "{} images with objects: IMAGES_FOLDER:annotations=FILE.json."
Results = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Folder for results.json and results.csv."),
]
Workers = Annotated[
    int | None, typer.Option(help="Decoding threads per process. [default: one a core]")
]


def _version(asked: bool) -> None:
    if asked:
        print(f"img2vec {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command("pretrain")
def pretrain_command(
    data: Data,
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
    student: Annotated[str | None, typer.Option(help="Any plain vit_* of timm.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Length of the schedule.")] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Stop after so many optimizer steps of the schedule.")
    ] = None,
    epoch_size: Annotated[
        int | None, typer.Option(help="Images of an epoch. [default: all of DATA]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images of one forward pass, per process.")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Forward passes of an optimizer step.")
    ] = None,
    blr: Annotated[
        float | None, typer.Option(help="Learning rate per 256 images of the global batch.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate, in place of --blr.")] = None,
    warmup_epochs: Annotated[
        float | None, typer.Option(help="[default: 40, at most a tenth of the epochs]")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="On matrices alone.")] = None,
    clip_grad: Annotated[
        float | None, typer.Option(help="Largest norm of the gradient. [default: not clipped]")
    ] = None,
    mask_ratio: Annotated[float | None, typer.Option(help="Fraction of units hidden.")] = None,
    mask_unit: Annotated[int | None, typer.Option(help="Side of a mask unit in pixels.")] = None,
    decoder_depth: Annotated[
        int | None, typer.Option(help="Layers of the decoder. [default: 2; ViT-L and -H: 4]")
    ] = None,
    decoder_dim: Annotated[int | None, typer.Option(help="Width of the decoder.")] = None,
    blocks: Annotated[
        str | None, typer.Option(help="Blocks to average: all, last, or numbers as 2,5,8,11.")
    ] = None,
    global_weight: Annotated[
        float | None, typer.Option(help="Weight of the global loss; 0 turns it off.")
    ] = None,
    target_norm: Annotated[
        str | None, typer.Option(help="Per teacher token: layer, l2 or none.")
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(help="pool-student or resample-teacher. [default: what the grids ask for]"),
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the view in pixels.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, float32 or bfloat16; auto is bfloat16 where it is native."),
    ] = None,
    compile: Annotated[
        str | None, typer.Option(help="auto, on or off: torch.compile; auto is on for CUDA.")
    ] = None,
    checkpoint_blocks: Annotated[
        bool | None,
        typer.Option(
            "--checkpoint-blocks/--no-checkpoint-blocks",
            help="Less memory: the encoder is computed again in the backward pass.",
        ),
    ] = None,
    shard: Annotated[
        bool | None,
        typer.Option("--shard/--no-shard", help="FSDP2: spread the student over the processes."),
    ] = None,
    workers: Workers = None,
    cache_ram: Annotated[
        bool | None,
        typer.Option("--cache-ram/--no-cache-ram", help="Keep the encoded images in memory."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order, crops and masks.")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. [default: one an epoch]")
    ] = None,
    keep: Annotated[int | None, typer.Option(help="How many checkpoints stay.")] = None,
    knn_every: Annotated[
        int | None, typer.Option(help="Epochs between k-NN accuracies, 0 for never.")
    ] = None,
    wandb: Annotated[
        bool | None, typer.Option("--wandb/--no-wandb", help="Report to Weights & Biases.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Go on where OUT stands, or move it to OUT.bak-N first."
        ),
    ] = True,
) -> None:
    """Pretrain a student; what is not given comes from --config, then from --preset."""
    options = {k: v for k, v in locals().items() if k not in _NOT_SETTINGS}
    if (teacher is None) == (teacher_module is None):
        raise UsageError(
            f"{'no teacher' if teacher is None else 'two teachers'} given: expected either --teacher "
            f"SPEC_or_RUN, or --teacher-module FILE.py:FUNCTION for a network of your own"
        )
    from img2vec.train import pretrain

    given = teacher if teacher is not None else own_teacher(teacher_module)[0]
    result = pretrain(data, given, out, preset=preset, config=config, resume=resume, **options)
    if _is_first_process():
        loss = "" if result.loss is None else f", loss {result.loss:.4f}"
        print(f"Done: step {result.step}, epoch {result.epoch}{loss}")
        print(f"Student: {result.student}")
        print(f'Load it: timm.create_model("local-dir:{result.student}", pretrained=True)')


_NOT_SETTINGS = {"data", "teacher", "teacher_module", "out", "preset", "config", "resume"}


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


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def main() -> None:
    """Run the command line; a mistake or a failure is one line on stderr, never a traceback."""
    from tokdiv.cli import run

    sys.exit(run(app))
