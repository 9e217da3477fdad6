"""A backbone for detection: any network of timm's with a feature pyramid of strides 4, 8, 16, 32 and 64.

A ViT has one map, from which ViTDet's simple feature pyramid makes the others (arXiv 2203.16527, section 3).
On large images its attention stays within windows, except in a few blocks. A network with maps of several
strides gets torchvision's feature pyramid network.
"""

import copy
import math
from collections import OrderedDict
from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from tokdiv.errors import UsageError, first_line
from tokdiv.teachers.architecture import create_model
from tokdiv.teachers.spec import CUSTOM, HANDCRAFTED
from tokdiv.teachers.teacher import Teacher

STRIDES = (4, 8, 16, 32)  # and 64, by pooling
NUM_LEVELS = len(STRIDES) + 1
LARGEST_GLOBAL_GRID = 32  # tokens: 512 px at patch 16; above, "auto" takes windows
NATURAL_WINDOW = 14  # tokens: the grid of pretraining at 224 px


class Backbone(nn.Module):
    """Normalized images (B, 3, H, W) to an ordered dict of five maps (B, out_channels, H/stride, W/stride).

    The maps are float32 also under autocast: torchvision makes its anchors in their dtype, and bfloat16 has
    8 bits, which misplaces an anchor at 1,000 px by up to 4 px.

    Args:
        body: a network of timm's.
        indices: the blocks or stages whose maps the pyramid takes.
        norm: whether the body's final norm is applied to them.
        pyramid: a list of maps -> a list of at most five maps.
    """

    def __init__(
        self, body: nn.Module, indices: list[int], norm: bool, pyramid: nn.Module, out_channels: int
    ) -> None:
        super().__init__()
        self.body, self.pyramid = body, pyramid
        self.out_channels = out_channels
        self.indices = indices
        self.options: dict[str, Any] = {"norm": True} if norm else {}  # not all networks have one

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.body.forward_intermediates(  # type: ignore[operator]
            images,
            indices=self.indices,
            output_fmt="NCHW",
            intermediates_only=True,
            stop_early=True,
            **self.options,
        )
        levels = self.pyramid(maps)
        while len(levels) < NUM_LEVELS:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        names = [*map(str, range(NUM_LEVELS - 1)), "pool"]  # as in torchvision
        return OrderedDict((name, level.float()) for name, level in zip(names, levels))

    def train(self, mode: bool = True) -> Self:
        """BatchNorm in the body keeps the statistics of pretraining: a step has too few images for better ones."""
        super().train(mode)
        for layer in self.body.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()
        return self


class SimplePyramid(nn.Module):
    """The last map of a ViT, [(B, C, H, W)], at strides 4, 8, 16 and 32, by deconvolution and pooling.

    Args:
        in_channels, stride: of the map; the stride is a power of two.
        channels: of the results.
    """

    def __init__(self, in_channels: int, stride: int, channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(
                *_rescaled(in_channels, stride, target),
                nn.Conv2d(_width(in_channels, stride, target), channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for target in STRIDES
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [level(maps[-1]) for level in self.levels]


def _width(channels: int, stride: int, target: int) -> int:
    """Channels after `_rescaled`: each deconvolution halves them."""
    return channels // max(1, stride // target)


def _rescaled(channels: int, stride: int, target: int) -> list[nn.Module]:
    """Layers from one stride to another."""
    if target > stride:
        return [nn.MaxPool2d(target // stride)]
    layers: list[nn.Module] = []
    while stride > target:
        if layers:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels, stride = channels // 2, stride // 2
    return layers


class TopDownPyramid(nn.Module):
    """torchvision's feature pyramid network on a list of maps, from the smallest stride to the largest."""

    def __init__(self, in_channels: list[int], channels: int) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork(in_channels, channels, norm_layer=nn.BatchNorm2d)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        named = OrderedDict((str(level), m) for level, m in enumerate(maps))
        return list(self.fpn(named).values())


class WindowedBlock(nn.Module):
    """A transformer block whose attention stays within square windows of the grid.

    Each window also sees the prefix tokens (class and register tokens), in a copy of its own; the copies are
    averaged afterwards. With one window for the whole grid this is the block itself.

    Args:
        block: tokens (B, num_prefix + H * W, C) -> the same shape.
        grid: (H, W). window: side of a window in tokens, which divides both.
    """

    def __init__(
        self, block: nn.Module, grid: tuple[int, int], window: int, num_prefix: int
    ) -> None:
        super().__init__()
        self.block = block
        self.grid, self.window, self.num_prefix = grid, window, num_prefix

    def forward(self, tokens: Tensor, rope: Tensor | None = None, **options: Any) -> Tensor:
        B, P = len(tokens), self.num_prefix
        windows = split_windows(tokens[:, P:], self.grid, self.window)
        num_windows = len(windows) // B
        prefix = tokens[:, :P].repeat_interleave(num_windows, dim=0)
        if rope is not None:  # (..., H * W, D), by position: each window has its own
            ropes = split_windows(rope.reshape(-1, *rope.shape[-2:]), self.grid, self.window)
            ropes = ropes.unflatten(0, (-1, num_windows)).transpose(0, 1)  # windows, heads or 1
            options["rope"] = ropes.repeat(B, 1, 1, 1)
        attended = self.block(torch.cat([prefix, windows], dim=1), **options)
        prefix = attended[:, :P].unflatten(0, (B, num_windows)).mean(dim=1)
        return torch.cat([prefix, join_windows(attended[:, P:], self.grid, self.window)], dim=1)


def split_windows(tokens: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """(B, H * W, C) -> (B * num_windows, window * window, C); the windows of an image follow each other."""
    rows, columns = grid[0] // window, grid[1] // window
    windows = tokens.unflatten(1, (rows, window, columns, window)).transpose(2, 3)
    return windows.reshape(len(tokens) * rows * columns, window * window, -1)


def join_windows(windows: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """The inverse of `split_windows`."""
    rows, columns = grid[0] // window, grid[1] // window
    tokens = windows.reshape(-1, rows, columns, window, window, windows.shape[-1]).transpose(2, 3)
    return tokens.flatten(1, 4)


def choose_window(window: str, grid: int) -> int | None:
    """The side of a window in tokens; None for global attention.

    Args:
        window: "auto", "off" or a number, as --window takes it. grid: side of the grid in tokens.

    Raises:
        UsageError: a number that does not divide the grid.
    """
    if window == "off" or (window == "auto" and grid <= LARGEST_GLOBAL_GRID):
        return None
    if window == "auto":
        sides = [n for n in range(7, 2 * NATURAL_WINDOW + 1) if grid % n == 0]
        return min(sides, key=lambda n: abs(n - NATURAL_WINDOW), default=None)
    if not window.isdecimal() or not 1 <= int(window) <= grid or grid % int(window):
        divisors = [str(n) for n in range(2, grid + 1) if grid % n == 0]
        raise UsageError(
            f"--window {window}: expected auto, off, or a side that divides the grid of {grid} tokens: "
            f"{', '.join(divisors)}"
        )
    return int(window)


# From a model to a backbone ----------------------------------------------------------------------


def build_backbone(
    teacher: Teacher,
    image_size: int,
    *,
    channels: int = 256,
    drop_path: float = 0.0,
    window: str = "auto",
    global_blocks: int = 4,
    checkpoint_blocks: bool = False,
) -> tuple[Backbone, list[str]]:
    """A trainable backbone with a teacher's weights, for square images of `image_size`.

    Position embeddings are resampled to the new grid. A patch size that is no power of two (14 px) is resampled
    to the nearest one: torchvision's heads assume strides of 4, 8, 16 and 32.

    Returns:
        The backbone; notes, one line each.

    Raises:
        UsageError: handcrafted features, a user's own module, or a network without such maps.
    """
    spec = teacher.spec
    if spec.architecture in HANDCRAFTED or spec.architecture == CUSTOM:
        raise UsageError(
            f"{teacher.name} is '{spec.architecture}': detection trains networks of timm's"
        )
    body = _create(teacher, drop_path)
    info = body.feature_info[: None if spec.block is None else spec.block + 1]
    by_stride = {stage["reduction"]: index for index, stage in enumerate(info)}  # the last of each
    plain = len({stage["reduction"] for stage in body.feature_info}) == 1
    strides = [s for s in by_stride if plain or s >= STRIDES[0]]
    if not plain and (not strides or strides != list(STRIDES[: len(strides)])):
        raise UsageError(
            f"{teacher.name} has maps of strides {', '.join(map(str, by_stride))}: detection needs "
            f"{', '.join(map(str, STRIDES))}"
        )
    indices = [by_stride[s] for s in strides]
    if hasattr(body, "prune_intermediate_layers"):
        body.prune_intermediate_layers(indices, prune_norm=not spec.norm, prune_head=True)
    body.load_state_dict(teacher.module.state_dict())
    notes: list[str] = []
    stride = _resize(body, teacher.name, image_size, notes)
    if plain:
        pyramid: nn.Module = SimplePyramid(info[-1]["num_chs"], stride, channels)
        notes += _add_windows(body, image_size // stride, window, global_blocks)
    else:
        pyramid = TopDownPyramid([info[index]["num_chs"] for index in indices], channels)
    if checkpoint_blocks:
        body.set_grad_checkpointing(True)
    backbone = Backbone(body, indices, bool(spec.norm), pyramid, channels)
    _check_size(backbone, teacher.name, image_size)
    return backbone, notes


def _create(teacher: Teacher, drop_path: float) -> Any:
    """The teacher's architecture at its own size, with stochastic depth."""
    spec = teacher.spec
    own = {"num_classes": 0, "drop_path_rate": drop_path}
    arguments = {k: v for k, v in spec.arguments.items() if k not in ("img_size", *own)}
    try:
        return create_model(
            spec.architecture, arguments, teacher.name, **own, img_size=teacher.size
        )
    except TypeError:  # a ConvNet takes no img_size
        return create_model(spec.architecture, arguments, teacher.name, **own)


def _check_size(backbone: Backbone, name: str, image_size: int) -> None:
    """Shapes alone, on the meta device: UsageError where the network cannot take such images."""
    shadow = copy.deepcopy(backbone).to("meta").eval()
    try:
        with torch.no_grad():
            shadow(torch.empty(1, 3, image_size, image_size, device="meta"))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"{name} cannot take images of {image_size} px: {first_line(error)}; give another --image-size"
        ) from None


def _resize(body: Any, name: str, image_size: int, notes: list[str]) -> int:
    """Fit position embeddings and patches to square images of `image_size`; the stride of a ViT's map."""
    patch_embed = getattr(body, "patch_embed", None)
    patch = getattr(patch_embed, "patch_size", None)
    if not hasattr(body, "set_input_size") or patch is None:
        return 0
    if len(set(patch)) > 1:
        raise UsageError(f"{name} has patches of {patch[0]} x {patch[1]} px: expected square ones")
    stride = 2 ** round(math.log2(patch[0]))
    if stride != patch[0]:
        notes.append(f"patches are resampled from {patch[0]} to {stride} px")
    try:
        body.set_input_size(
            img_size=(image_size, image_size),
            **({"patch_size": (stride, stride)} if stride != patch[0] else {}),
        )
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UsageError(f"{name} cannot take images of {image_size} px: {error}") from None
    return stride


def _add_windows(body: Any, grid: int, window: str, global_blocks: int) -> list[str]:
    """Make all blocks windowed but `global_blocks` of them, evenly spaced, the last one included."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    side = choose_window(window, grid)
    if side is None:
        too_large = window == "auto" and grid > LARGEST_GLOBAL_GRID
        return [f"attention is global: no window divides the grid of {grid}"] if too_large else []
    if not isinstance(body, (VisionTransformer, Eva)):
        # The attention of others (BEiT's position bias) is made for one grid.
        return [f"attention is global: {type(body).__name__} takes no windows"]
    depth = len(body.blocks)
    kept = {depth * (n + 1) // global_blocks - 1 for n in range(global_blocks)}
    for number in set(range(depth)) - kept:
        body.blocks[number] = WindowedBlock(
            body.blocks[number], (grid, grid), side, body.num_prefix_tokens
        )
    if len(kept) >= depth:
        return []
    return [
        f"attention within windows of {side} x {side} tokens, global in blocks "
        f"{', '.join(map(str, sorted(kept)))} of {depth}"
    ]
