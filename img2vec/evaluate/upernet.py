"""UPerNet on a plain ViT or any timm backbone with stages, as MAE and BEiT fine-tune on ADE20K.

Xiao et al., Unified Perceptual Parsing (arXiv 1807.10221); for ViTs, Bao et al., BEiT (arXiv 2106.08254, app. D):
the output of four blocks is rescaled to strides 4, 8, 16 and 32.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from img2vec.evaluate.classifier import parameter_groups
from tokdiv.errors import UsageError
from tokdiv.teachers.architecture import create_model
from tokdiv.teachers.teacher import Teacher

STRIDES = (4, 8, 16, 32)
POOL_SIZES = (1, 2, 3, 6)
CONVNET_CHANNELS = 512
AUXILIARY_CHANNELS, AUXILIARY_LEVEL = 256, 2  # the auxiliary head sees the map of stride 16
DROPOUT = 0.1  # of whole channels, before each classifier


class UPerNet(nn.Module):
    """A backbone with its pyramid and heads.

    Args:
        backbone: a timm network with `forward_intermediates`.
        blocks: the four blocks or stages that are used, in order of depth.
        widths, strides: channels and stride in pixels of their outputs.
        channels: of the head. num_classes: of the logits.
    """

    def __init__(
        self,
        backbone: nn.Module,
        blocks: list[int],
        widths: list[int],
        strides: list[int],
        channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.backbone, self.blocks = backbone, blocks
        self.rescale = nn.ModuleList(
            rescaling(width, doublings(stride, wanted))
            for width, stride, wanted in zip(widths, strides, STRIDES)
        )
        self.lateral = nn.ModuleList(conv(width, channels, 1) for width in widths[:-1])
        self.pooling = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), conv(widths[-1], channels, 1))
            for size in POOL_SIZES
        )
        self.bottleneck = conv(widths[-1] + len(POOL_SIZES) * channels, channels, 3)
        self.smooth = nn.ModuleList(conv(channels, channels, 3) for _ in widths[:-1])
        self.fuse = conv(len(widths) * channels, channels, 3)
        self.classify = classifier(channels, num_classes)
        self.auxiliary = nn.Sequential(
            conv(widths[AUXILIARY_LEVEL], AUXILIARY_CHANNELS, 3),
            classifier(AUXILIARY_CHANNELS, num_classes),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the head, at stride 4, and of the auxiliary head, at stride 16.

        Args:
            images: normalized (B, 3, H, W).
        """
        maps = self.pyramid(images)
        laterals = [layer(plane) for layer, plane in zip(self.lateral, maps)]
        top = maps[-1]
        pooled = [resize(layer(top), top) for layer in self.pooling]
        laterals.append(self.bottleneck(torch.cat([top, *pooled], dim=1)))
        for level in range(len(laterals) - 1, 0, -1):
            laterals[level - 1] = laterals[level - 1] + resize(laterals[level], laterals[level - 1])
        levels = [layer(plane) for layer, plane in zip(self.smooth, laterals)] + laterals[-1:]
        fused = self.fuse(torch.cat([resize(plane, levels[0]) for plane in levels], dim=1))
        return self.classify(fused), self.auxiliary(maps[AUXILIARY_LEVEL])

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """The backbone's four maps, at strides 4, 8, 16 and 32."""
        maps = self.backbone.forward_intermediates(  # type: ignore[operator]
            images, indices=self.blocks, output_fmt="NCHW", intermediates_only=True
        )
        return [layer(plane) for layer, plane in zip(self.rescale, maps)]


def conv(inputs: int, outputs: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def classifier(channels: int, num_classes: int) -> nn.Sequential:
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, 0)  # type: ignore[arg-type]
    return nn.Sequential(nn.Dropout2d(DROPOUT), layer)


def resize(plane: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(plane, size=like.shape[2:], mode="bilinear")


def doublings(stride: int, wanted: int) -> int:
    """How often a map is enlarged twofold (below 0: reduced) to come nearest to the wanted stride."""
    return round(math.log2(stride / wanted))


def rescaling(width: int, doublings: int) -> nn.Module:
    """BEiT's: transposed convolutions of 2x2 enlarge, max pooling reduces."""
    if doublings < 0:
        return nn.MaxPool2d(2**-doublings)
    layers: list[nn.Module] = []
    for number in range(doublings):
        if number:
            layers += [nn.BatchNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width, 2, stride=2))
    return nn.Sequential(*layers)


def build_upernet(
    teacher: Teacher,
    num_classes: int,
    *,
    blocks: list[int] | None,
    channels: int | None,
    drop_path: float,
) -> UPerNet:
    """A trainable network with the teacher's weights and new heads; new layers draw from the global generator.

    Args:
        blocks: four blocks or stages; None: see `choose_levels`.
        channels: of the head; None: the width of a ViT, 512 for a ConvNet.

    Raises:
        UsageError: handcrafted features, a user's own module, blocks that the network does not have, or a
            network with fewer than four stages.
    """
    spec = teacher.spec
    if spec.is_handcrafted or spec.is_custom:
        raise UsageError(
            f"{teacher.name} is '{spec.architecture}': --head upernet takes timm models"
        )
    own: dict[str, Any] = {"num_classes": 0, "drop_path_rate": drop_path}
    arguments = {k: v for k, v in spec.arguments.items() if k not in (*own, "img_size")}
    try:
        backbone = create_model(
            spec.architecture, arguments, teacher.name, **own, img_size=teacher.size
        )
    except TypeError:  # a ConvNet takes no img_size
        backbone = create_model(spec.architecture, arguments, teacher.name, **own)
    last = len(backbone.feature_info) - 1 if spec.block is None else spec.block
    info = [dict(entry) for entry in backbone.feature_info][: last + 1]
    blocks = choose_levels(teacher.name, [entry["reduction"] for entry in info], blocks)
    backbone.prune_intermediate_layers(blocks, prune_norm=True, prune_head=True)
    weights = teacher.module.state_dict()
    missing, _ = backbone.load_state_dict(weights, strict=False)
    if missing := [name for name in missing if not name.endswith("num_batches_tracked")]:
        raise UsageError(f"{teacher.name}: no weights for {', '.join(missing[:3])}")
    widths = [info[block]["num_chs"] for block in blocks]
    strides = [info[block]["reduction"] for block in blocks]
    if channels is None:
        channels = widths[-1] if len(set(strides)) == 1 else CONVNET_CHANNELS
    return UPerNet(backbone, blocks, widths, strides, channels, num_classes)


def choose_levels(name: str, strides: list[int], blocks: list[int] | None) -> list[int]:
    """The four blocks or stages of the pyramid.

    A ViT's, whose blocks have one stride: at a third, a half, two thirds of the depth and the last (3, 5, 7, 11 of
    12; 7, 11, 15, 23 of 24), as in BEiT. Of other networks, the last stage of each stride, and of these the last
    four.

    Args:
        strides: of each block's output, in pixels.
        blocks: what the user asks for.
    """
    depth = len(strides)
    if blocks is not None:
        if (
            len(blocks) != 4
            or sorted(set(blocks)) != blocks
            or not 0 <= blocks[0] <= blocks[-1] < depth
        ):
            raise UsageError(
                f"--blocks {','.join(map(str, blocks))}: --head upernet takes four blocks of {name}, ascending, "
                f"of 0 to {depth - 1}"
            )
        return blocks
    if len(set(strides)) == 1:
        if depth < 4:
            raise UsageError(f"{name} has {depth} blocks: --head upernet takes four")
        levels = (depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1)
        return [
            max(level, number) for number, level in enumerate(levels)
        ]  # four, also of four or five
    last_of = {stride: block for block, stride in enumerate(strides)}
    if len(last_of) < 4:
        raise UsageError(
            f"{name} has stages of strides {', '.join(map(str, last_of))}: --head upernet takes four"
        )
    return list(last_of.values())[-4:]


def upernet_groups(
    network: UPerNet, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups with `lr_scale`: 1 for the new layers, layer_decay ** (blocks above + 1) in the backbone."""
    groups = parameter_groups(network.backbone, weight_decay, layer_decay)
    top = max(group["lr_scale"] for group in groups)
    for group in groups:
        group["lr_scale"] *= layer_decay / top
    new = [p for name, p in network.named_parameters() if not name.startswith("backbone.")]
    groups.append({"params": [p for p in new if p.ndim > 1], "weight_decay": weight_decay})
    groups.append({"params": [p for p in new if p.ndim <= 1], "weight_decay": 0.0})
    return groups
