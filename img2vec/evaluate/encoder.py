"""Load any model as a frozen Teacher: a pretrained student, a checkpoint, or a SPEC."""

import os
import tempfile
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from img2vec.evaluate.classifier import mean_and_std
from img2vec.export import WEIGHTS, export_student, is_timm_folder, read_student
from tokdiv.dist import choose_device, choose_dtype
from tokdiv.errors import UsageError
from tokdiv.teachers.load import load_teacher
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.teacher import Teacher

FEATURES = ("mean", "cls")


def load_encoder(
    model: str | Path | Teacher,
    *,
    feature: str = "mean",
    image_size: int | Literal["native"] | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Teacher:
    """Load a model, frozen, in eval mode, for uint8 images.

    Args:
        model: OUT of a pretraining, an exported folder, a checkpoint, a SPEC, or a Teacher.
        feature: "mean" of the spatial tokens (a ViT's patch tokens after the final norm), or a ViT's "cls"
            token after the final norm.
        image_size: side of the view in pixels; None: a student's own, 224 for a SPEC; "native": the model's own.
        device: as `tokdiv.dist.choose_device` takes it.
        dtype: "float32", "bfloat16" (autocast), or "auto": bfloat16 where the device has it natively.

    Returns:
        A Teacher whose mean token is the feature; with "cls" it has that one token.

    Raises:
        UsageError: no such model, or it has no class token.
    """
    if feature not in FEATURES:
        raise UsageError(f"--feature {feature}: expected one of {', '.join(FEATURES)}")
    chosen = choose_device(device)
    dtype = choose_dtype(dtype, chosen)
    if isinstance(model, Teacher):
        if image_size not in (None, "native", model.size):
            raise UsageError(
                f"{model.name} takes images of {model.size} px, not {image_size}: make the Teacher "
                f"with size={image_size}"
            )
        teacher = model
    else:
        teacher = _load(model, image_size)
    if feature == "cls":
        teacher = _class_token(teacher)
    return teacher.prepare(chosen, dtype)


def _load(model: str | Path, image_size: int | Literal["native"] | None) -> Teacher:
    path = Path(model).expanduser()
    if not path.exists() or path.suffix == ".toml":
        text = str(model)
        if isinstance(model, Path) or (
            os.sep in text and not text.startswith("timm:") and "=" not in text
        ):
            raise UsageError(
                f"'{text}': no such file or folder; expected OUT of img2vec pretrain, an exported folder, a "
                f"checkpoint, or a SPEC such as dino_resnet50"
            )
        return load_teacher(text, image_size=image_size)
    for folder in (path, path / "student"):
        if is_timm_folder(folder):
            return _load_folder(folder, str(model), image_size)
    # A checkpoint is exported first, so that its student is loaded and checked as an exported one.
    with tempfile.TemporaryDirectory(prefix="img2vec-") as temporary:
        folder = export_student(**read_student(path), out=Path(temporary) / "student")
        return _load_folder(folder, str(model), image_size)


def _load_folder(folder: Path, name: str, image_size: int | Literal["native"] | None) -> Teacher:
    student = read_student(folder)
    native = student["input_size"]
    arguments = {k: v for k, v in student["model_args"].items() if k != "img_size"}
    spec = TeacherSpec(
        name=name,
        architecture=student["architecture"],
        weights=str((folder / WEIGHTS).resolve()),
        mean=student["mean"],
        std=student["std"],
        input_size=native,
        size=image_size if isinstance(image_size, int) else native,
        arguments=arguments,
    )
    return load_teacher(spec)


def _class_token(teacher: Teacher) -> Teacher:
    """The same network with its class token as the only token."""
    if getattr(teacher.module, "cls_token", None) is None:
        raise UsageError(f"{teacher.name} has no class token: use --feature mean")

    def tokens(module: nn.Module, images: Tensor) -> Tensor:
        # What lies behind the spec's block, and an unwanted final norm, were cut off when it was loaded.
        return module.forward_features(images)[:, :1]  # type: ignore[operator]

    mean, std = mean_and_std(teacher)
    return Teacher(
        teacher.module,
        tokens,
        mean=mean,
        std=std,
        size=teacher.size,
        name=teacher.name,
        spec=teacher.spec,
    )
