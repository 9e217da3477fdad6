"""Settings, a teacher and a model small enough for runs of a second."""

from typing import Any

import torch
from torch import nn

from img2vec.config import make_config
from img2vec.data import plan_epoch
from img2vec.masking import plan_layout
from img2vec.model import Img2Vec, make_student
from img2vec.step import Training, make_training
from tokdiv import Teacher
from tokdiv.dist import current_processes

# Image of 64 px, patches and mask units of 16 px: 4 x 4 of each, 10 of 16 hidden.
SMALL: dict[str, Any] = {
    "student": "test_vit",
    "student_args": {"depth": 2},
    "image_size": 64,
    "mask_unit": 16,
    "decoder_dim": 32,
    "decoder_depth": 2,
    "batch_size": 4,
    "epochs": 4,
    "warmup_epochs": 1,
    "lr": 1e-3,
    "dtype": "float32",
    "device": "cpu",
    "workers": 1,
    "knn_every": 0,
}


def make_teacher(stride: int = 16, size: int = 64, dim: int = 12, seed: int = 7) -> Teacher:
    """A small frozen network: a convolution with BatchNorm, tokens of `stride` pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, dim, stride, stride),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1),
        )
    return Teacher(network, size=size, name="small")


def make_model(
    teacher_grid: tuple[int, int] = (4, 4), dim: int = 12, align: str | None = None, **options: Any
) -> Img2Vec:
    """An Img2Vec of SMALL settings with some changed."""
    config = make_config(options=SMALL | options)
    torch.manual_seed(config.seed)
    student = make_student(config)
    patch = student.patch_embed.patch_size[0]
    layout = plan_layout(
        config.image_size, patch, config.mask_unit, config.mask_ratio, teacher_grid, align
    )
    return Img2Vec(student, layout, dim, config)


def make_small_training(model: Img2Vec, teacher: Teacher, **options: Any) -> Training:
    """What a step of SMALL settings works with, on this process alone."""
    config = make_config(options=SMALL | options)
    plan = plan_epoch(24, config.batch_size, config.accumulate, 1)
    return make_training(config, plan, current_processes(), teacher, model)
