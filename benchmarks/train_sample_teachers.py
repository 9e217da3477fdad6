"""Train the three sample teachers that ship with the package: MAE and DINO, tiny, on a CPU in under an hour.

    python benchmarks/train_sample_teachers.py $TOKDIV_DATA/imagenet_1000 $TOKDIV_DATA/caltech40/train \\
        --knn-train $TOKDIV_DATA/caltech40/train --knn-val $TOKDIV_DATA/caltech40/val

`sample_mae_vit` and `sample_dino_vit` are ViT-tiny with 4 blocks, `sample_dino_resnet` a ResNet-10 of half
width. The methods are lightly's MAE and DINO modules (`pip install -e '.[dev]'`) with a small recipe: 96 px,
batch 32, AdamW. They are for trying the tool where no network can be reached, not for pretraining.

Writes NAME.safetensors (float16, timm's key names) and NAME.md (what it was trained on, for how long, and its
k-NN accuracy beside the untrained network's) into tokdiv/samples/teachers; `tokdiv/zoo.py` holds the sha256.
"""

import argparse
import copy
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine  # noqa: F401  (lets it run without installing)
import timm
import torch
from lightly.loss import DINOLoss
from lightly.models import utils
from lightly.models.modules import (
    DINOProjectionHead,
    MAEDecoderTIMM,
    MaskedVisionTransformerTIMM,
)
from lightly.transforms import DINOTransform, MAETransform
from lightly.utils.scheduler import cosine_schedule
from PIL import Image
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from img2vec.evaluate import knn
from img2vec.optim import BETAS, learning_rate, parameter_groups
from tokdiv import TeacherSpec, load_teacher
from tokdiv.data.open import open_source

OUT = Path(__file__).parent.parent / "tokdiv" / "samples" / "teachers"
SIZE, LOCAL_SIZE, SHORT_SIDE = 96, 48, 136  # pixels
BATCH_SIZE, WARMUP, WEIGHT_DECAY, CLIP = 32, 4, 0.05, 3.0  # warm-up in epochs
PROTOTYPES = 2048  # outputs of DINO's head
SOURCES = (
    "one of each of ImageNet's 1,000 classes\n  (image-net.org: non-commercial research only) and the training "
    "part of 40 classes of Caltech-101\n  (gathered for research from the web, rights with the photographers)"
)
VIT = ("vit_tiny_patch16_224", {"depth": 4})
RESNET = ("resnet10t", {"channels": [32, 64, 128, 256]})


@dataclass(frozen=True)
class Recipe:
    method: str
    architecture: str
    arguments: dict[str, Any]  # of the timm architecture
    epochs: int
    lr: float


RECIPES = {
    "sample_mae_vit": Recipe("MAE", *VIT, epochs=50, lr=1e-3),
    "sample_dino_vit": Recipe("DINO", *VIT, epochs=22, lr=5e-4),
    "sample_dino_resnet": Recipe("DINO", *RESNET, epochs=12, lr=1e-3),
}


class Photographs(Dataset[list[Tensor]]):
    """Images of folders, decoded once to `SHORT_SIDE`, as views of a transform."""

    def __init__(self, folders: list[Path], transform: Callable[[Image.Image], list[Tensor]]):
        files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
        self.images = [_decode(file) for file in tqdm(files, desc="decode", unit="image")]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index])


def _decode(path: Path) -> Image.Image:
    with Image.open(path) as image:
        scale = SHORT_SIDE / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


class Mae(nn.Module):
    """He et al., arXiv 2111.06377, with lightly's modules: 75% masked, a decoder of 2 blocks, normalized pixels."""

    transform = MAETransform(input_size=SIZE, min_scale=0.2)

    def __init__(self, recipe: Recipe, steps: int) -> None:
        super().__init__()
        vit = timm.create_model(
            recipe.architecture, img_size=SIZE, num_classes=0, **recipe.arguments
        )
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(
            num_patches=(SIZE // 16) ** 2,
            patch_size=16,
            embed_dim=vit.embed_dim,
            decoder_embed_dim=128,
            decoder_depth=2,
            decoder_num_heads=4,
        )

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        images = views[0]
        size = (len(images), self.backbone.sequence_length)
        keep, hidden = utils.random_token_mask(size=size, mask_ratio=0.75)
        visible = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, size)
        tokens = utils.set_at_index(tokens, keep, visible.type_as(tokens))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), hidden))
        # Token 0 is the class token, so patch i is token i + 1.
        target = utils.get_at_index(utils.patchify(images, 16), hidden - 1)
        return nn.functional.mse_loss(predicted, utils.normalize_mean_var(target, dim=-1))

    def before_update(self, epoch: int) -> None:
        pass

    def after_update(self, step: int) -> None:
        pass

    def trained(self) -> nn.Module:
        return self.backbone.vit


class Dino(nn.Module):
    """Caron et al., arXiv 2104.14294, with lightly's loss and head: 2 views of 96 px and 4 of 48 px."""

    transform = DINOTransform(
        global_crop_size=SIZE,
        global_crop_scale=(0.3, 1.0),
        local_crop_size=LOCAL_SIZE,
        local_crop_scale=(0.05, 0.3),
        n_local_views=4,
        cj_hue=0.0,  # slow, and so is blur
        gaussian_blur=(0.0, 0.0, 0.0),
    )

    def __init__(self, recipe: Recipe, steps: int) -> None:
        super().__init__()
        arguments = dict(recipe.arguments)
        if recipe.architecture.startswith("vit"):
            arguments |= {"img_size": SIZE, "dynamic_img_size": True}
        self.student = timm.create_model(recipe.architecture, num_classes=0, **arguments)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.student_head, self.teacher_head = (
            DINOProjectionHead(
                self.student.num_features,
                hidden_dim=512,
                bottleneck_dim=128,
                output_dim=PROTOTYPES,
                freeze_last_layer=1,
            )
            for _ in range(2)
        )
        self.teacher_head.load_state_dict(self.student_head.state_dict())
        self.teacher_head.requires_grad_(False)
        self.loss = DINOLoss(
            output_dim=PROTOTYPES,
            warmup_teacher_temp_epochs=5,
            teacher_temp=0.05,
            center_momentum=0.9,
        )
        self.steps = steps
        self.steps_per_epoch = steps // recipe.epochs

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        whole, parts = torch.cat(views[:2]), torch.cat(views[2:])
        with torch.no_grad():
            targets = self.teacher_head(self.teacher(whole)).float()
        predictions = [
            chunk
            for x in (whole, parts)
            for chunk in self.student_head(self.student(x)).float().split(len(views[0]))
        ]
        return self.loss(list(targets.chunk(2)), predictions, epoch=step // self.steps_per_epoch)

    def before_update(self, epoch: int) -> None:
        self.student_head.cancel_last_layer_gradients(epoch)

    def after_update(self, step: int) -> None:
        momentum = cosine_schedule(step, self.steps, 0.99, 1.0)
        utils.update_momentum(self.student, self.teacher, m=momentum)
        utils.update_momentum(self.student_head, self.teacher_head, m=momentum)

    def trained(self) -> nn.Module:
        return self.teacher


def train(recipe: Recipe, folders: list[Path]) -> tuple[nn.Module, int, list[float]]:
    """The trained backbone, the number of images, and the mean loss of each epoch."""
    torch.manual_seed(0)
    method = Mae if recipe.method == "MAE" else Dino
    data = Photographs(folders, method.transform)
    steps_per_epoch = len(data) // BATCH_SIZE
    steps = steps_per_epoch * recipe.epochs
    model = method(recipe, steps).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, WEIGHT_DECAY), lr=recipe.lr, betas=BETAS, fused=True
    )
    loader = DataLoader(
        data, BATCH_SIZE, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    losses = []
    with tqdm(total=steps, desc=recipe.method, unit="step") as bar:
        for epoch in range(recipe.epochs):
            total = 0.0
            for step, views in enumerate(loader, start=epoch * steps_per_epoch):
                rate = learning_rate(step / steps_per_epoch, recipe.epochs, WARMUP, recipe.lr)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(views, step)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                model.before_update(epoch)
                optimizer.step()
                model.after_update(step)
                total += loss.item()
                bar.update()
            losses.append(total / steps_per_epoch)
            bar.set_postfix(epoch=epoch + 1, loss=f"{losses[-1]:.3f}")
    return model.trained(), len(data), losses


def save(module: nn.Module, path: Path) -> str:
    """Write the weights in float16, and return the file's sha256."""
    state = {k: v.contiguous() for k, v in module.state_dict().items()}
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)
    path.chmod(0o644)  # safetensors writes for the owner alone
    return hashlib.sha256(path.read_bytes()).hexdigest()


def spec_of(name: str, recipe: Recipe, weights: str) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        architecture=recipe.architecture,
        weights=weights,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        input_size=SIZE,
        arguments=recipe.arguments,
    )


def accuracy(spec: TeacherSpec, arguments: argparse.Namespace) -> float:
    """k-NN top-1 accuracy at the rankings' view of 224 px, k = 10, mean of the tokens."""
    teacher = load_teacher(spec)
    return knn(teacher, arguments.knn_train, arguments.knn_val, k=[10]).metrics["top1_k10"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", type=Path, help="folders of images")
    parser.add_argument("--knn-train", required=True, help="a folder of class folders")
    parser.add_argument("--knn-val", required=True, help="a held-out one")
    parser.add_argument(
        "--sources", default=SOURCES, help="the images and their terms, for the cards"
    )
    parser.add_argument("--teacher", action="append", choices=RECIPES, help="[default: all]")
    parser.add_argument("--epochs", type=int, help="instead of the recipes'")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.teacher or RECIPES:
        recipe = RECIPES[name]
        if arguments.epochs:
            recipe = replace(recipe, epochs=arguments.epochs)
        begin = time.perf_counter()
        module, num_images, losses = train(recipe, arguments.images)
        minutes = (time.perf_counter() - begin) / 60
        file = (arguments.out / f"{name}.safetensors").resolve()
        sha256 = save(module, file)
        learned, held_out = open_source(arguments.knn_train), open_source(arguments.knn_val)
        classes = held_out.classes or []
        before = accuracy(spec_of(name, recipe, "random"), arguments)
        after = accuracy(spec_of(name, recipe, str(file)), arguments)
        card = CARD.format(
            name=name,
            **vars(recipe),
            parameters=sum(p.numel() for p in module.parameters()) / 1e6,
            num_images=num_images,
            minutes=minutes,
            first=losses[0],
            last=losses[-1],
            before=before,
            after=after,
            sha256=sha256,
            size=SIZE,
            cores=os.cpu_count(),
            sources=arguments.sources,
            knn=f"{len(classes)} classes, {held_out.count:,} held-out images against {learned.count:,}",
        )
        file.with_suffix(".md").write_text(card)
        print(card)


CARD = """\
# {name}

{method} of a timm `{architecture}` with {arguments}: {parameters:.1f} million parameters, in float16.
For trying the tool without a network: not for pretraining, and no measure of what {method} can do.

- **Trained on** {num_images:,} photographs without their labels: {sources}.
- **For** {epochs} epochs at {size} px: {minutes:.0f} minutes on a CPU with {cores} cores. Mean loss {first:.3f} in
  the first epoch, {last:.3f} in the last.
- **By** `benchmarks/train_sample_teachers.py`, with lightly's modules for {method}.
- **k-NN accuracy** {after:.3f}; the same network untrained: {before:.3f}. ({knn}; weighted, k = 10, mean token
  at 224 px, `img2vec knn`.)
- **License** CC BY-NC 4.0, because of the images: see LICENSE.md.
- **sha256** `{sha256}`
"""


if __name__ == "__main__":
    main()
