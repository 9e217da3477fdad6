"""What one would write in half an hour: one pass per teacher, DataLoader, PIL, K x K matrix.

It is correct, and `rank_throughput.py` compares with it; `dtype` gives it bfloat16 autocast on a GPU.
"""

from pathlib import Path

import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class Images(Dataset):
    def __init__(self, paths: list[Path], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


@torch.no_grad()
def mean_similarities(
    paths: list[Path],
    models: dict[str, torch.nn.Module],
    batch_size: int = 32,
    workers: int = 2,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Mean off-diagonal cosine similarity of each model's tokens."""
    result = {}
    for name, model in models.items():
        data = timm.data.resolve_model_data_config(model)
        loader = DataLoader(
            Images(paths, data["mean"], data["std"]), batch_size, num_workers=workers
        )
        scores = []
        for images in loader:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                features = model.forward_features(images.to(device))
            prefix = getattr(model, "num_prefix_tokens", 0)
            tokens = (
                features[:, prefix:] if features.ndim == 3 else features.flatten(2).transpose(1, 2)
            )
            unit = torch.nn.functional.normalize(tokens.float(), dim=2)
            cosines = unit @ unit.transpose(1, 2)
            K = cosines.shape[1]
            scores.append((cosines.sum(dim=(1, 2)) - K) / (K * (K - 1)))
        result[name] = torch.cat(scores).mean().item()
    return result
