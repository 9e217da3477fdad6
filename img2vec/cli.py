"""The command line: parse, call, print. Torch is imported inside the commands, so that help comes at once."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from img2vec.config import PRESETS
from tokdiv import __version__
from tokdiv.cli import TeacherModule, own_teacher
from tokdiv.errors import UsageError

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
Train = Annotated[str, typer.Option(help="Images with classes to learn from.")]
Val = Annotated[str, typer.Option(help="Images with classes to measure on.")]
Results = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where results.json and .csv go.")
]
Workers = Annotated[
    int | None, typer.Option(help="Decoding threads per process. [default: one a core]")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str, typer.Option(help="auto, float32 or bfloat16; auto is bfloat16 where it is native.")
]
Feature = Annotated[str, typer.Option(help="mean (of the patch tokens) or cls.")]
ImageSize = Annotated[
    int | None, typer.Option(help="Side of the view in pixels. [default: the model's own]")
]
Seed = Annotated[int, typer.Option(help="Of all that is random.")]


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
def knn(
    model: Model,
    train: Train,
    val: Val,
    out: Results = None,
    k: Annotated[str, typer.Option(help="Neighbors, joined with commas.")] = "10,20,100,200",
    temperature: Annotated[float, typer.Option(help="Of the votes' weights.")] = 0.07,
    feature: Feature = "mean",
    image_size: ImageSize = None,
    batch_size: Annotated[int, typer.Option(help="Images of one forward pass.")] = 64,
    workers: Workers = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Weighted k-nearest-neighbor accuracy of frozen features, as in DINO."""
    options = {key: v for key, v in locals().items() if key != "k"}
    from img2vec import evaluate

    _evaluate(evaluate.knn, options | {"k": _numbers("--k", k)})


@app.command()
def probe(
    model: Model,
    train: Train,
    val: Val,
    out: Results = None,
    solver: Annotated[str, typer.Option(help="lars (MAE's recipe) or lbfgs (quick).")] = "lars",
    epochs: Annotated[int, typer.Option(help="Of LARS.")] = 90,
    batch_size: Annotated[int, typer.Option(help="Global; at most the data.")] = 16384,
    blr: Annotated[float, typer.Option(help="Learning rate per 256 images.")] = 0.1,
    lr: Annotated[float | None, typer.Option(help="In place of --blr.")] = None,
    warmup_epochs: Annotated[int, typer.Option(help="Of LARS.")] = 10,
    penalty: Annotated[
        float | None, typer.Option(help="Of lbfgs. [default: chosen on a fifth of --train]")
    ] = None,
    feature: Feature = "mean",
    image_size: ImageSize = None,
    encode_batch_size: Annotated[int, typer.Option(help="Images of one forward pass.")] = 64,
    workers: Workers = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Accuracy of a linear classifier on frozen features, as in MAE."""
    options = dict(locals())
    from img2vec import evaluate

    _evaluate(evaluate.probe, options)


@app.command()
def finetune(
    model: Model,
    train: Train,
    val: Val,
    out: Results = None,
    epochs: Annotated[int, typer.Option(help="Length of the schedule.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Global; at most the data.")] = 1024,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Images of one forward pass, per process. [default: all]")
    ] = None,
    blr: Annotated[float, typer.Option(help="Learning rate per 256 images.")] = 5e-4,
    lr: Annotated[float | None, typer.Option(help="In place of --blr.")] = None,
    min_lr: Annotated[float, typer.Option(help="At the end of the cosine.")] = 1e-6,
    warmup_epochs: Annotated[int, typer.Option(help="Of linear warm-up.")] = 5,
    weight_decay: Annotated[float, typer.Option(help="On matrices alone.")] = 0.05,
    layer_decay: Annotated[float, typer.Option(help="Of the rate, from block to block.")] = 0.65,
    drop_path: Annotated[float, typer.Option(help="Stochastic depth of the last block.")] = 0.1,
    mixup: Annotated[float, typer.Option(help="Alpha; 0 turns it off.")] = 0.8,
    cutmix: Annotated[float, typer.Option(help="Alpha; 0 turns it off.")] = 1.0,
    smoothing: Annotated[float, typer.Option(help="Of the labels.")] = 0.1,
    auto_augment: Annotated[str, typer.Option(help="As timm's --aa.")] = "rand-m9-mstd0.5-inc1",
    reprob: Annotated[float, typer.Option(help="Probability of random erasing.")] = 0.25,
    image_size: ImageSize = None,
    workers: Workers = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Accuracy after training the whole network with labels, as in MAE."""
    options = dict(locals())
    from img2vec import evaluate

    _evaluate(evaluate.finetune, options)


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


def _evaluate(task: Any, options: dict[str, Any]) -> None:
    """Run an evaluation on all processes and print its table once."""
    from tokdiv.dist import processes

    positional = [options.pop(name) for name in ("model", "train", "val", "out")]
    with processes(options["device"]) as team:
        results = task(*positional, **options)
        if team.rank == 0:
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
