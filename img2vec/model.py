"""The student: a timm ViT that sees the visible patches, a light decoder, and two heads.

The masked-autoencoder design (He et al., arXiv 2111.06377) with the multi-block representation and the
global head of Img2Vec (arXiv 2304.12535, section 3).
"""

from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from img2vec.attention import last_tokens
from img2vec.config import Config
from img2vec.masking import Layout, check_multiple, plan_layout, split_indices
from tokdiv.errors import UsageError
from tokdiv.teachers.architecture import create_model
from tokdiv.teachers.spec import nearest
from tokdiv.teachers.teacher import Teacher

EPSILON = 1e-6  # of every LayerNorm, as in timm's ViTs
PLAIN = "expected a plain VisionTransformer of timm, as vit_base_patch16_224"
HEAD_DIM = 32  # channels of one head of the decoder, as in MAE's (512 in 16 heads)


class Prediction(NamedTuple):
    """What the student predicts for a batch.

    tokens: (B, M, C) the masked target tokens. image: (B, C) the mean of all target tokens, None where the
    global loss is off. representation: (B, V, D) the visible patches' multi-block tokens.
    """

    tokens: Tensor
    image: Tensor | None
    representation: Tensor


def make_student(config: Config) -> VisionTransformer:
    """The encoder, without a classifier, initialized as in MAE, from torch's current generator.

    Raises:
        UsageError: no model of timm, no plain ViT, or arguments it does not take.
    """
    name = config.student
    if not timm.is_model(name):
        raise UsageError(
            f"--student '{name}': timm has no such model{nearest(name, timm.list_models('*vit*'))}"
        )
    if "img_size" in config.student_args:
        raise UsageError("student_args: img_size is the side of the view: give it as --image-size")
    try:
        student = create_model(
            name, config.student_args, "student_args", num_classes=0, img_size=config.image_size
        )
    except TypeError:
        raise UsageError(f"--student '{name}' takes no image size: {PLAIN}") from None
    except UsageError as error:
        raise UsageError(f"{error}; {PLAIN}") from None
    _check_plain(student, config)
    _initialize(student)
    positions = sine_positions(student.patch_embed.grid_size, student.embed_dim)
    prefix = student.pos_embed.shape[1] - len(positions)
    with torch.no_grad():
        student.pos_embed[0, :prefix] = 0
        student.pos_embed[0, prefix:] = positions
        for token in (student.cls_token, student.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
    student.pos_embed.requires_grad_(False)
    # Not used in training: blocks are normalized without learned parameters. So the final norm of the exported
    # student, with weight 1 and bias 0, is the norm of its last block in training.
    student.norm.requires_grad_(False)
    student.fc_norm.requires_grad_(False)
    return student


def _check_plain(student: nn.Module, config: Config) -> None:
    """Raise UsageError for a student that `Img2Vec` cannot run on visible patches alone."""
    name = f"--student '{config.student}'"
    if type(student) is not VisionTransformer or type(student.patch_embed) is not PatchEmbed:
        raise UsageError(f"{name} is a {type(student).__name__}: {PLAIN}")
    if student.pos_embed is None or not isinstance(student.patch_embed.norm, nn.Identity):
        raise UsageError(f"{name} has no position embeddings to give to visible patches: {PLAIN}")
    if student.attn_pool is not None:
        raise UsageError(f"{name} pools by attention: {PLAIN}")
    if not isinstance(student.patch_drop, nn.Identity):
        raise UsageError(
            "student_args: patch_drop_rate: the mask drops patches already; leave it out"
        )
    height, width = student.patch_embed.patch_size
    if height != width:
        raise UsageError(f"{name} has patches of {height} x {width} px: expected squares")
    check_multiple(config.image_size, width, "the student's patch")


def make_model(encoder: VisionTransformer, teacher: Teacher, config: Config) -> "Img2Vec":
    """Encoder, decoder and heads for a teacher's tokens.

    Raises:
        UsageError: grids that do not fit together, or blocks that the encoder does not have.
    """
    layout = plan_layout(
        config.image_size,
        encoder.patch_embed.patch_size[0],
        config.mask_unit,
        config.mask_ratio,
        teacher.grid,
        config.align,
        teacher.name,
    )
    return Img2Vec(encoder, layout, teacher.dim, config)


def resolve_blocks(text: str, depth: int) -> tuple[int, ...]:
    """Zero-based block numbers, ascending: of "all", "last" or "N,...".

    Raises:
        UsageError: anything else, or a number that the student does not have.
    """
    if text == "all":
        return tuple(range(depth))
    if text == "last":
        return (depth - 1,)
    try:
        blocks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        blocks = []
    if not blocks or blocks[0] < 0 or blocks[-1] >= depth:
        raise UsageError(
            f"--blocks '{text}': expected all, last, or numbers from 0 to {depth - 1} joined with commas"
        )
    return tuple(blocks)


class Img2Vec(nn.Module):
    """Encoder, decoder and heads: encode the visible patches, decode the masked ones, predict their targets.

    Args:
        encoder: from `make_student`.
        layout: the grids, from `masking.plan_layout`.
        dim: channels C of the teacher's tokens.
        config: the run's settings.

    Raises:
        UsageError: blocks that the encoder does not have.
    """

    mean: Tensor
    std: Tensor
    cells: Tensor
    decoder_positions: Tensor

    def __init__(
        self, encoder: VisionTransformer, layout: Layout, dim: int, config: Config
    ) -> None:
        super().__init__()
        width, narrow = encoder.embed_dim, config.decoder_dim
        depth = config.decoder_depth or (4 if width >= 1024 else 2)
        self.encoder = encoder
        self.layout = layout
        self.blocks = resolve_blocks(config.blocks, len(encoder.blocks))
        for block in encoder.blocks[self.blocks[-1] + 1 :]:
            block.requires_grad_(
                False
            )  # blocks after the last chosen one are neither run nor trained
        self.checkpoint_blocks = config.checkpoint_blocks
        self.decoder_embed = nn.Linear(width, narrow)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, narrow))
        self.decoder_blocks = nn.ModuleList(
            Block(narrow, narrow // HEAD_DIM, qkv_bias=True, norm_layer=_layer_norm)
            for _ in range(depth)
        )
        self.decoder_norm = _layer_norm(narrow)
        self.head = nn.Linear(narrow, dim)
        self.global_head = (
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))
            if config.global_weight > 0
            else None
        )
        for module in (self.decoder_embed, self.decoder_blocks, self.head, self.global_head):
            if module is not None:
                _initialize(module)
        nn.init.normal_(self.mask_token, std=0.02)
        # In units of uint8 images.
        scale = torch.tensor([config.mean, config.std]).mul(255).view(2, 3, 1, 1)
        self.register_buffer("mean", scale[0], persistent=False)
        self.register_buffer("std", scale[1], persistent=False)
        self.register_buffer(
            "decoder_positions", sine_positions(layout.patches, narrow), persistent=False
        )

    def forward(self, images: Tensor, mask: Tensor) -> Prediction:
        """Predict the masked target tokens of a batch.

        Args:
            images: (B, 3, S, S) uint8, 0 to 255.
            mask: bool (B, units), True where masked; the same number in each row.
        """
        visible, masked, _ = split_indices(mask, self.layout)
        representation = self.encode(images, visible)
        decoded = self.decode(representation, visible, masked)
        prefix = self.encoder.num_prefix_tokens
        patches = representation[:, prefix:]
        image = None if self.global_head is None else self.global_head(patches.mean(dim=1))
        return Prediction(self.head(decoded), image, patches)

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """The multi-block representation of the visible patches (section 3.2).

        The mean of the chosen blocks' outputs, after a LayerNorm without parameters. The paper does not say how
        blocks of different scale are combined; without the norm, the last blocks, whose residual stream is
        largest, would dominate.

        Args:
            images: (B, 3, S, S) uint8. visible: int64 (B, V), ascending patch numbers.

        Returns:
            (B, prefix + V, D): class and register tokens, where the student has them, then patches.
        """
        encoder = self.encoder
        tokens = self._embed(images, visible)
        positions = encoder.pos_embed
        prefix = encoder.num_prefix_tokens
        offset = positions.shape[1] - self.layout.num_patches  # 0 or the prefix, as timm's variants
        tokens = tokens + positions[0, offset:][visible]
        before = [t for t in (encoder.cls_token, encoder.reg_token) if t is not None]
        if before:
            first = torch.cat(before, dim=1)
            first = first + positions[:, :offset] if offset else first
            tokens = torch.cat([first.expand(len(tokens), prefix, -1), tokens], dim=1)
        tokens = encoder.norm_pre(encoder.pos_drop(tokens))
        total: Tensor | None = None
        for number, block in enumerate(encoder.blocks):
            if number > self.blocks[-1]:
                break
            tokens = self._run(block, tokens)
            if number in self.blocks:
                output = F.layer_norm(tokens, tokens.shape[-1:], eps=EPSILON)
                total = output if total is None else total + output
        assert total is not None  # resolve_blocks gives at least one
        return total / len(self.blocks) if len(self.blocks) > 1 else total

    def decode(self, representation: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """The decoder's tokens at the masked positions, one per target token.

        The sequence is not put back in order, since attention needs none: visible tokens come first, masked ones
        last, each with its position embedding. Where a target token covers several patches, their tokens are
        averaged; the head is linear, so this averages their predictions.

        Args:
            representation: (B, prefix + V, D). visible: int64 (B, V). masked: int64 (B, M * cells).

        Returns:
            (B, M, decoder_dim).
        """
        seen = self.decoder_embed(representation)
        prefix = seen.shape[1] - visible.shape[1]
        positions = self.decoder_positions
        tokens = torch.cat(
            [
                seen[:, :prefix],
                seen[:, prefix:] + positions[visible],
                self.mask_token + positions[masked],
            ],
            dim=1,
        )
        for block in self.decoder_blocks[:-1]:
            tokens = last_tokens(block, tokens, tokens.shape[1])
        decoded = self.decoder_norm(last_tokens(self.decoder_blocks[-1], tokens, masked.shape[1]))
        cells = self.layout.cells.shape[1]
        return decoded.unflatten(1, (-1, cells)).mean(dim=2) if cells > 1 else decoded

    def _embed(self, images: Tensor, visible: Tensor) -> Tensor:
        """(B, V, D): cut out, normalize and embed the visible patches only."""
        projection = self.encoder.patch_embed.proj
        side = projection.kernel_size[0]
        rows, columns = self.layout.patches
        # (B, rows, columns, 3, side, side)
        patches = images.unflatten(2, (rows, side)).unflatten(4, (columns, side))
        patches = patches.permute(0, 2, 4, 1, 3, 5)
        batch = torch.arange(len(images), device=images.device)[:, None]
        patches = patches[batch, visible // columns, visible % columns]
        pixels = patches.to(self.mean.dtype).sub_(self.mean).div_(self.std).flatten(2)
        return F.linear(pixels, projection.weight.flatten(1), projection.bias)

    def _run(self, block: nn.Module, tokens: Tensor) -> Tensor:
        if self.checkpoint_blocks and self.training:
            return checkpoint(block, tokens, use_reentrant=False)
        return block(tokens)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The exported student's tokens of unmasked images: uint8 (B, 3, S, S) to (B, K, D)."""
        training = self.encoder.training
        self.encoder.eval()
        pixels = images.to(self.mean.dtype).sub_(self.mean).div_(self.std)
        features = self.encoder.forward_features(pixels)
        self.encoder.train(training)
        return features[:, self.encoder.num_prefix_tokens :]


def choose_attention(model: Img2Vec, device: torch.device, dtype: str) -> None:
    """Use fused attention (SDPA), except for bfloat16 on a CPU.

    There the backward pass of torch's kernel takes 2 to 3 times as long as plain matrix products, for up to 256
    tokens. In float32 plain products are faster too for the encoder's short sequences, but their memory for the
    backward pass costs more than that.
    """
    if device.type == "cpu" and dtype == "bfloat16" and model.layout.num_patches <= 256:
        for block in [*model.encoder.blocks, *model.decoder_blocks]:
            attention: Any = block.attn
            attention.fused_attn = False


def encoder_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of the model's state dict, under timm's own names."""
    start = "encoder."
    return {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}


def sine_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed sine and cosine position embeddings of a grid: float32 (rows * columns, dim).

    The first half of the channels is for the row, the second for the column. Each has sines, then cosines, of
    the coordinate times 10000^(-2i / half) (Vaswani et al., arXiv 1706.03762, section 3.5, per axis). Where dim
    is not a multiple of 4, the remaining channels are 0.
    """
    quarter = dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij"
    )
    angles = torch.cat([c.reshape(-1, 1, 1) * frequencies for c in (rows, columns)], dim=1)
    table = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)  # (N, 2 * 2 * quarter)
    return F.pad(table, (0, dim - table.shape[1])).float()


def _layer_norm(dim: int, **kwargs: Any) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=EPSILON, **kwargs)


def _initialize(module: nn.Module) -> None:
    """Xavier-uniform matrices and zero biases, as in MAE's released pretraining."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
