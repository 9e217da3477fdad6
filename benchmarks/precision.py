"""Effect of bfloat16 on the scores: the shift of each teacher's mean, and of each pair's difference.

    TOKDIV_DATA=DATA python benchmarks/precision.py

500 real images through the real weights of TOKDIV_DATA, in float32 and in bfloat16 autocast.
"""

import argparse
import itertools
import os
import tempfile
from pathlib import Path

import machine

import tokdiv

LIMIT = 0.001


def real_teachers(data: Path) -> list[str]:
    """The six networks with real weights, as SPECs."""
    weights = data / "weights"
    mobile = "timm:mobilenetv2_100@{}:pad_type=same:mean=0.5:std=0.5"
    return [
        f"resnet18=timm:resnet18@{weights / 'resnet18_in1k_layers1-3_bnfolded.safetensors'}:blocks=3",
        f"vit_tiny=timm:vit_tiny_patch16_224@{weights / 'vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors'}"
        ":mean=0.5:std=0.5",
        *(
            f"mobilenet_{name}="
            + mobile.format(weights / f"mobilenetv2_100.coral_{file}.safetensors")
            for name, file in (
                ("ptq", "tf2_ptq_in1k"),
                ("qat", "qat_in1k"),
                ("bird", "qat_inat_bird"),
                ("insect", "qat_inat_insect"),
            )
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    if "TOKDIV_DATA" not in os.environ:
        print("skipped: set TOKDIV_DATA to the folder with the real images and weights")
        return
    data = Path(os.environ["TOKDIV_DATA"])
    means, device = {}, arguments.device
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            ranking = tokdiv.rank(
                data / "imagenet_1000",
                [*real_teachers(data), "pixels", "hog"],
                Path(folder) / "run",
                certify="none",
                max_images=arguments.num_images,
                dtype=dtype,
                device=device,
            )
        means[dtype] = {t.name: t.mean_similarity for t in ranking.teachers}
    shifts = {name: means["bfloat16"][name] - mean for name, mean in means["float32"].items()}
    pairs = {f"{a} - {b}": shifts[a] - shifts[b] for a, b in itertools.combinations(shifts, 2)}
    rows = ["| teacher | float32 | bfloat16 | shift |", "| --- | ---: | ---: | ---: |"]
    for name, shift in shifts.items():
        rows.append(
            f"| {name} | {means['float32'][name]:.5f} | {means['bfloat16'][name]:.5f} | {shift:+.5f} |"
        )
    worst = max(pairs, key=lambda pair: abs(pairs[pair]))
    rows += [
        "",
        f"Largest shift of a teacher's mean: {max(map(abs, shifts.values())):.5f}; of a pair's difference: "
        f"{abs(pairs[worst]):.5f} ({worst}). Target: at most {LIMIT}, over {arguments.num_images} images.",
    ]
    result = {
        "machine": machine.describe(device),
        "num_images": arguments.num_images,
        "means": means,
        "shifts": shifts,
        "pair_shifts": pairs,
    }
    machine.write("precision", "Effect of bfloat16 on the mean similarity", result, "\n".join(rows))


if __name__ == "__main__":
    main()
