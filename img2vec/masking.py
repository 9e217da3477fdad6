"""The grids of patches, mask units and target tokens on an image, and which units are masked.

The mask is drawn in squares of `unit` pixels. Each holds a whole number of the student's patches and of target
tokens, so that no token is half masked.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tokdiv.errors import UsageError

Grid = tuple[int, int]  # rows, columns

# The purpose of a draw: the second half of its generator's key.
CROP, MASK = 1, 2


@dataclass(frozen=True)
class Layout:
    """The grids of one run.

    Attributes:
        patches: the student's grid. units: the grid of mask units.
        targets: the grid on which predictions meet the teacher's tokens.
        resample: whether the teacher's tokens have to be resampled to `targets`.
        num_masked: masked units per image.
    """

    patches: Grid
    units: Grid
    targets: Grid
    resample: bool
    num_masked: int

    @property
    def num_units(self) -> int:
        return self.units[0] * self.units[1]

    @property
    def num_patches(self) -> int:
        return self.patches[0] * self.patches[1]

    @property
    def num_visible_patches(self) -> int:
        return self.num_patches * (self.num_units - self.num_masked) // self.num_units

    @property
    def num_masked_targets(self) -> int:
        return self.targets[0] * self.targets[1] * self.num_masked // self.num_units

    @cached_property
    def cells(self) -> np.ndarray:
        """int64 (targets, patches per target): which patches each target token covers, row-major."""
        rows, columns = (p // t for p, t in zip(self.patches, self.targets))
        numbers = np.arange(self.num_patches).reshape(
            self.targets[0], rows, self.targets[1], columns
        )
        return numbers.transpose(0, 2, 1, 3).reshape(-1, rows * columns)


def plan_layout(
    image_size: int,
    patch: int,
    unit: int,
    ratio: float,
    teacher_grid: Grid,
    align: str | None = None,
    teacher: str = "the teacher",
) -> Layout:
    """Fit the student's patches, the mask units and the teacher's tokens together.

    Args:
        image_size, patch, unit: sides in pixels.
        ratio: fraction of units to mask: round(ratio * units) of them.
        teacher_grid: rows and columns of the teacher's tokens.
        align: "pool-student", "resample-teacher", or None for what fits.
        teacher: its name, for messages.

    Raises:
        UsageError: sides that do not divide each other, no visible or no masked unit, or a teacher grid that
            cannot be aligned as asked.
    """
    check_multiple(image_size, patch, "the student's patch")
    check_multiple(image_size, unit, "--mask-unit")
    check_multiple(unit, patch, "the student's patch", option="--mask-unit")
    side = image_size // patch
    across = image_size // unit
    num_units = across * across
    num_masked = round(ratio * num_units)
    if not 0 < num_masked < num_units:
        missing = "masked" if num_masked == 0 else "visible"
        raise UsageError(
            f"--mask-ratio {ratio} of {num_units} mask units of {unit} px leaves none {missing}: "
            f"expected a ratio between {0.5 / num_units:.3g} and {1 - 0.5 / num_units:.3g}, or a smaller "
            f"--mask-unit"
        )
    patches, units = (side, side), (across, across)
    if align is None:
        finer = any(t > side for t in teacher_grid)
        align = "resample-teacher" if finer else "pool-student"
    if align == "resample-teacher":
        return Layout(patches, units, patches, teacher_grid != patches, num_masked)
    grid = f"{teacher}'s grid of {teacher_grid[0]} x {teacher_grid[1]} tokens"
    if any(side % t for t in teacher_grid):
        raise UsageError(
            f"{grid} cannot be aligned by pooling the student's grid of {side} x {side}: it does not divide "
            f"it; set --align resample-teacher, another --image-size, or the teacher's :size="
        )
    if any(t % across for t in teacher_grid):
        least = image_size // min(teacher_grid)
        raise UsageError(
            f"--mask-unit {unit} is finer than a token of {teacher} ({least} px) or cuts it: tokens would be "
            f"half masked; set --mask-unit {least} or --align resample-teacher"
        )
    return Layout(patches, units, teacher_grid, False, num_masked)


def check_multiple(value: int, side: int, name: str, option: str = "--image-size") -> None:
    """Raise UsageError where an option's value is not a multiple of a side in pixels."""
    if value % side:
        raise UsageError(
            f"{option} {value} is not a multiple of {name} of {side} px; the nearest is "
            f"{max(1, round(value / side)) * side}"
        )


def generator(seed: int, purpose: int, epoch: int, position: int) -> np.random.Philox:
    """The random numbers of one image in one epoch, the same in every process."""
    return np.random.Philox(key=[seed, purpose], counter=[0, 0, position, epoch])


def draw_mask(layout: Layout, seed: int, epoch: int, position: int) -> np.ndarray:
    """Which units of an image are masked: bool (num_units,), True for exactly `num_masked` of them."""
    draws = generator(seed, MASK, epoch, position).random_raw(layout.num_units)
    mask = np.zeros(layout.num_units, dtype=bool)
    mask[np.argsort(draws, kind="stable")[: layout.num_masked]] = True
    return mask


def on_grid(mask: Tensor, units: Grid, grid: Grid) -> Tensor:
    """A mask of units, bool (B, units), on a grid that divides them: bool (B, rows * columns)."""
    rows, columns = grid[0] // units[0], grid[1] // units[1]
    mask = mask.unflatten(1, units)
    return mask.repeat_interleave(rows, 1).repeat_interleave(columns, 2).flatten(1)


def split_indices(mask: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the visible patches and of what is predicted.

    Args:
        mask: bool (B, units), True where masked; the same number in each row.

    Returns:
        visible: int64 (B, V), ascending patch numbers.
        masked: int64 (B, M * cells), patch numbers; those of one target token are adjacent.
        targets: int64 (B, M), ascending numbers of the masked target tokens.
    """
    patches = on_grid(mask, layout.units, layout.patches).to(torch.uint8)
    visible = patches.argsort(dim=1, stable=True)[:, : layout.num_visible_patches]
    target_mask = on_grid(mask, layout.units, layout.targets).to(torch.uint8)
    targets = target_mask.argsort(dim=1, stable=True)[:, -layout.num_masked_targets :]
    if layout.targets == layout.patches:
        return visible, targets, targets
    cells = torch.as_tensor(layout.cells, device=mask.device)
    return visible, cells[targets].flatten(1), targets
