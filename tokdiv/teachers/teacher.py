"""The Teacher: uint8 images in, tokens out, whatever the network behind it."""

import dataclasses
import hashlib
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Self

import torch
from torch import Tensor, nn

from tokdiv.errors import RunError, UsageError, first_line
from tokdiv.teachers.spec import CUSTOM, LoadedSpec, TeacherSpec, Triple, triple
from tokdiv.teachers.zoo import IMAGENET_MEAN, IMAGENET_STD

DEFAULT_SIZE = 224  # pixels: the paper's view

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Teacher(nn.Module):
    """A frozen network that maps uint8 images to tokens; normalizes its input itself.

    Args:
        module: the network; it is frozen and set to eval mode, and stays so. It gets normalized float
            images (B, 3, size, size) and returns a feature map (B, C, H, W) or tokens (B, K, C).
        tokens: where the module's output is neither: a function of that output, `tokens(output)`, or one
            that runs the network itself, `tokens(module, images)`. It returns either of the two.
        mean, std: of the RGB channels, in units of [0, 1]; one number stands for all three.
        size: side of the view in pixels.
        name: the label in rankings and pictures.
        grid: rows and columns of the tokens, where they are no feature map and no square; (1, K) if it
            is not given, which leaves `similarity_7x7` out.
        spec: how to load it again, with the mean, std, size and name that hold in place of the above; None for a
            module of the user's own.

    Attributes:
        spec: how to load it again, with all that was found out.
        grid: (rows, columns) of the tokens.
        num_tokens: K = rows * columns, without CLS or register tokens.
        dim: C.
        dtype: of the forward pass; bfloat16 means autocast.

    Raises:
        UsageError: the network cannot take images of this size, or returns something else than tokens.
    """

    mean: Tensor
    std: Tensor
    spec: LoadedSpec

    def __init__(
        self,
        module: nn.Module,
        tokens: Callable[..., Tensor] | None = None,
        mean: Triple | float = IMAGENET_MEAN,
        std: Triple | float = IMAGENET_STD,
        size: int = DEFAULT_SIZE,
        name: str = "custom",
        grid: tuple[int, int] | None = None,
        spec: TeacherSpec | None = None,
    ) -> None:
        super().__init__()
        mean, std = triple("mean", mean, name), triple("std", std, name)
        view = {"mean": mean, "std": std, "size": size, "input_size": size}
        asked = spec or TeacherSpec(name, CUSTOM, norm=False, **view)  # type: ignore[arg-type]
        assert asked.mean and asked.std and asked.size
        self.name, self.size = asked.name, asked.size
        self.module = module.requires_grad_(False)
        self.dtype = torch.float32
        self._tokens_of = _token_function(module, tokens)
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._cast = False  # whether `prepare` rounded the weights
        for key, value in (("mean", asked.mean), ("std", asked.std)):
            self.register_buffer(key, torch.tensor(value).mul(255).view(3, 1, 1), persistent=False)
        self.channels_last = sum(isinstance(m, nn.Conv2d) for m in module.modules()) > 1
        if (parameter := next(module.parameters(), None)) is not None:
            self.to(parameter.device)
        self.eval()
        self.grid, self.dim = self._probe(grid)
        self.num_tokens = self.grid[0] * self.grid[1]
        self.spec = LoadedSpec.of(
            asked,
            num_tokens=self.num_tokens,
            dim=self.dim,
            parameters=sum(p.numel() for p in module.parameters()),
        )

    def train(self, mode: bool = True) -> Self:
        """A teacher stays in eval mode, also where a model that holds it is set to train."""
        return super().train(False)

    def prepare(
        self, device: str | torch.device, dtype: str = "float32", compile: bool = False
    ) -> Self:
        """Move to a device and choose how the forward pass runs.

        Args:
            device: as torch takes it.
            dtype: "float32", or "bfloat16" for autocast. A mobile ConvNet (depthwise convolutions with
                BatchNorm) stays in float32 either way: rounding its weights to bfloat16 moved the mean
                similarity of real ones by up to 0.0024. What bfloat16 does to the others is in
                benchmarks/results/precision.md.
            compile: through `torch.compile`; on a CPU with the weights as constants ("freezing").

        The weights of a user's own module are hashed into its spec, as those of files are when they are loaded.

        Raises:
            UsageError: float32 is asked for, but the weights were cast to bfloat16 before.
        """
        if self._cast and DTYPES[dtype] == torch.float32:
            raise UsageError(
                f"{self.name} was loaded with dtype bfloat16, which float32 cannot restore; load it anew"
            )
        if self.spec.is_custom:
            self.spec = dataclasses.replace(self.spec, sha256=state_sha256(self.module))
        self.dtype = torch.float32 if _is_mobile(self.module) else DTYPES[dtype]
        self.to(device)
        if self.channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.dtype != torch.float32 and not self.spec.is_custom:
            # Autocast would cast these frozen weights anew in every forward pass; cast once, the
            # numbers are the same. Subclasses may compute with their weights before (standardized
            # convolutions do) and stay as they are.
            for layer in self.module.modules():
                if type(layer) in (nn.Linear, nn.Conv2d) or type(layer).__name__ == "Conv2dSame":
                    layer.to(self.dtype)
            self._cast = True
        self._compiled = None
        if compile:
            # Graphs are counted by function, and all teachers share `_features`: room for more than 8 networks.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            self._compiled = torch.compile(self._features)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Tokens of a batch of images.

        Args:
            images: (B, 3, size, size) uint8 RGB, 0 to 255.

        Returns:
            (B, K, C) float (bfloat16 under autocast), row-major over the grid.

        Raises:
            TypeError: images of another kind.
            RunError: a module of the user's own fails.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise TypeError(
                f"a teacher takes uint8 images of shape (B, 3, H, W), got {images.dtype} of shape "
                f"{tuple(images.shape)}"
            )
        with (
            torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32),
            # Read when a graph is compiled, which is at the first batch of a shape.
            torch._inductor.config.patch(freezing=True)
            if self._compiled is not None and images.device.type == "cpu"
            else nullcontext(),
        ):
            try:
                output = (self._compiled or self._features)(self.normalize(images))
            except Exception as error:
                if not self.spec.is_custom or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise RunError(
                    f"{self.name}: your code raised {type(error).__name__}: {first_line(error)}"
                ) from error
        return output.flatten(2).transpose(1, 2) if output.ndim == 4 else output

    @torch.no_grad()
    def blocks(self, images: Tensor) -> list[Tensor]:
        """Tokens of every block or stage, from one forward pass; no final norm is applied.

        Args:
            images: as `forward` takes them.

        Returns:
            One (B, K, C) a block, in order of depth; K and C may differ between them.

        Raises:
            UsageError: a network that timm did not make, whose blocks are unknown.
        """
        if self.spec.is_handcrafted:
            return [self(images)]
        if self.spec.is_custom:
            raise UsageError(
                f"{self.name}: the blocks of a module of your own are unknown; name a timm network"
            )
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            planes = self.module.forward_intermediates(  # type: ignore[operator]
                self.normalize(images), output_fmt="NCHW", intermediates_only=True
            )
        return [plane.flatten(2).transpose(1, 2) for plane in planes]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, size, size) as the network gets them: float32, by this teacher's mean and std."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(torch.float32, memory_format=layout).sub_(self.mean).div_(self.std)

    def _features(self, images: Tensor) -> Tensor:
        return self._tokens_of(self.module, images)

    def _probe(self, grid: tuple[int, int] | None) -> tuple[tuple[int, int], int]:
        """The grid and width of the tokens, from one black image."""
        if any(parameter.is_meta for parameter in self.module.parameters()):
            raise UsageError(f"{self.name} has no weights (meta device): load them first")
        black = torch.zeros(1, 3, self.size, self.size, device=self.mean.device)
        try:
            with torch.no_grad():
                output = self._features(black)
        except MemoryError:
            raise
        except Exception as error:  # whatever a user's own network raises
            raise UsageError(
                f"{self.name} cannot take images of {self.size} px: {first_line(error)}"
            ) from error
        found = type(output).__name__
        if isinstance(output, Tensor):
            found = f"shape {tuple(output.shape)}"
            if not output.is_floating_point():
                raise UsageError(
                    f"{self.name} returned tokens of {output.dtype}: expected floating point"
                )
            if len(output.shape) in (3, 4) and len(output) == 1 and 0 not in output.shape:
                if output.ndim == 4:
                    return (output.shape[2], output.shape[3]), output.shape[1]
                K, C = output.shape[1:]
                return self._grid(K, grid), C
        raise UsageError(
            f"{self.name} returned {found} for one image: expected a feature map (1, C, H, W) or tokens "
            f"(1, K, C); pass tokens=FUNCTION to make them"
        )

    def _grid(self, num_tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
        """Rows and columns of tokens that are no feature map."""
        if grid is None and num_tokens in {n * n + 1 for n in range(7, 65)}:
            raise UsageError(
                f"{self.name} gives {num_tokens} tokens, a square and one more: leave the CLS token out, or pass "
                f"grid=(ROWS, COLUMNS) if they are all spatial"
            )
        side = round(num_tokens**0.5)
        grid = grid or ((side, side) if side * side == num_tokens else (1, num_tokens))
        if grid[0] * grid[1] != num_tokens:
            raise UsageError(
                f"{self.name} gives {num_tokens} tokens, which are not a grid of {grid[0]} x {grid[1]}"
            )
        return grid


def _token_function(
    module: nn.Module, tokens: Callable[..., Tensor] | None
) -> Callable[[nn.Module, Tensor], Tensor]:
    """The three ways to say where the tokens are, as one function of (module, images)."""
    if tokens is None:
        return lambda module, images: module(images)
    if getattr(tokens, "__self__", None) is module:
        return lambda module, images: tokens(
            images
        )  # a method of the module, as module.forward_features
    parameters = inspect.signature(tokens).parameters.values()
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) >= 2:
        return tokens
    return lambda module, images: tokens(module(images))


def state_sha256(module: nn.Module) -> str:
    """A hash of a module's weights, for those that come from no file."""
    hashed = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def _is_mobile(module: nn.Module) -> bool:
    layers = list(module.modules())
    depthwise = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in layers)
    return depthwise and any(isinstance(m, nn.BatchNorm2d) for m in layers)
