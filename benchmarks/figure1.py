"""Does a more diverse teacher make a better student? Figure 1 of Img2Vec (arXiv 2304.12535) at small scale.

    TOKDIV_DATA=DATA python benchmarks/figure1.py

Ranks the sample teachers, untrained networks, pixels, hog and two real networks of TOKDIV_DATA on the training
images of `caltech40` (its MobileNets are left out for time: 3 x 3 tokens at 96 px, and slow on a CPU),
pretrains the same student (ViT-tiny, 4 blocks, 96 px) on them with each teacher for the
same number of steps, for each seed, and measures the students on held-out images: weighted k-NN (k = 10) and
a linear probe (L-BFGS), both on the mean token. Labels are used for nothing else.

Reported is Spearman's rank correlation of diversity and accuracy over the teachers, with the 95% interval of
Bonett & Wright (2000) (Fisher's z with standard error sqrt((1 + rho^2/2) / (n - 3))) and an exact or sampled
permutation test's p. A finished student is not trained again: interrupt it, and the same command goes on.

Writes results/figure1.{json,md,png,svg}.
"""

import argparse
import hashlib
import json
import math
import os
from pathlib import Path

import machine
import numpy as np
import pandas as pd
from precision import real_teachers
from scipy import stats

import img2vec
import tokdiv
from img2vec.config import Config
from img2vec.evaluate import knn, probe
from tokdiv.figures.diversity_accuracy import diversity_accuracy_figure
from tokdiv.figures.style import save_figure

ROOT = Path(__file__).resolve().parent.parent
SIZE = 96  # pixels: 6 x 6 patches of 16 px
CONFIG = Config(
    student="vit_tiny_patch16_224",
    student_args={"depth": 4},
    image_size=SIZE,
    decoder_depth=1,
    decoder_dim=192,
    crop_scale=(0.35, 1.0),
    batch_size=16,
    epochs=8,
    lr=2e-3,
    clip_grad=3.0,
    knn_every=0,
    cache_ram=True,
    save_every=10**6,
)
MEASURES = {"knn": "k-NN accuracy", "probe": "linear probe accuracy"}


def candidates(data: Path) -> list[str]:
    """SPECs of small trained networks, untrained ones of the same architectures, baselines, and real weights."""
    real = [spec for spec in real_teachers(data) if not spec.startswith("mobilenet")]
    return [
        "sample_mae_vit",
        "sample_dino_vit",
        "sample_dino_resnet",
        "untrained_vit=timm:vit_tiny_patch16_224@random:depth=4",
        "untrained_resnet=timm:resnet18@random",
        "pixels",
        "hog",
        *real,
    ]


def student_accuracy(
    spec: tokdiv.TeacherSpec, seed: int, data: Path, folder: Path
) -> dict[str, float]:
    """Pretrain a student and measure it, unless an earlier call did."""
    config = Config.from_dict(CONFIG.to_dict() | {"seed": seed})
    what = json.dumps([config.to_dict(), spec.to_dict()], sort_keys=True)
    done = folder / f"{spec.name}-{seed}-{hashlib.sha256(what.encode()).hexdigest()[:8]}.json"
    if not done.exists():
        run = img2vec.pretrain(data / "train", spec, folder / f"{spec.name}-{seed}", config=config)
        sets = {"train": str(data / "train"), "val": str(data / "val")}
        measured = {
            "knn": knn(run.student, **sets, k=[10]).metrics["top1_k10"],
            "probe": probe(run.student, **sets, solver="lbfgs").metrics["top1"],
        }
        done.write_text(json.dumps(measured))
    return json.loads(done.read_text())


def rank_correlation(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Spearman's rho of n pairs, its 95% interval, and the two-sided p of a permutation test."""
    rho = float(stats.spearmanr(x, y).statistic)
    error = math.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    z = math.atanh(max(-0.999999, min(0.999999, rho)))
    low, high = (math.tanh(z + sign * 1.96 * error) for sign in (-1, 1))
    test = stats.permutation_test(
        (x,),
        lambda permuted: stats.spearmanr(permuted, y).statistic,
        permutation_type="pairings",
        n_resamples=9_999,
        rng=np.random.default_rng(0),
    )
    return {"rho": rho, "low": low, "high": high, "p": float(test.pvalue), "n": len(x)}


def measure(arguments: argparse.Namespace) -> dict:
    data = Path(arguments.data) / "caltech40"
    work = Path(arguments.work)
    ranking = tokdiv.rank(
        data / "train",
        candidates(Path(arguments.data)),
        work / "ranking",
        image_size=SIZE,
        max_images=arguments.num_images,
        certify="none",
    )
    rows = []
    for teacher in ranking.teachers:
        students = [
            student_accuracy(teacher.spec, seed, data, work) for seed in range(arguments.seeds)
        ]
        print(teacher.name, students, flush=True)
        row = {"name": teacher.name, "baseline": teacher.baseline, "diversity": teacher.diversity}
        row["centred_diversity"] = 1 - (teacher.centred_similarity or math.nan)
        for key in MEASURES:
            values = [student[key] for student in students]
            row |= {
                key: float(np.mean(values)),
                f"{key}_low": min(values),
                f"{key}_high": max(values),
            }
        rows.append(row)
    table = pd.DataFrame(rows)
    groups = {"all": table, "trained": table[~table.baseline]}
    return {
        "machine": machine.describe(),
        "teachers": rows,
        "correlations": {
            f"{key}, {diversity}, {group}": rank_correlation(
                part[diversity].to_numpy(), part[key].to_numpy()
            )
            for key in MEASURES
            for diversity in ("diversity", "centred_diversity")
            for group, part in groups.items()
        },
        "config": CONFIG.to_dict(),
        "seeds": arguments.seeds,
    }


def markdown(result: dict) -> str:
    rows = [
        "| teacher | diversity | centred diversity | k-NN accuracy of its student | linear probe |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["teachers"]:
        name = row["name"] + (" (baseline)" if row["baseline"] else "")
        accuracies = (
            f"{row[k]:.3f} ({row[f'{k}_low']:.3f} to {row[f'{k}_high']:.3f})" for k in MEASURES
        )
        rows.append(
            f"| {name} | {row['diversity']:.4f} | {row['centred_diversity']:.4f} | "
            + " | ".join(accuracies)
            + " |"
        )
    rows += [
        "",
        "| rank correlation of | with | over | rho | 95% interval | p |",
        "| --- | --- | --- | ---: | --- | ---: |",
    ]
    for name, found in result["correlations"].items():
        key, diversity, group = name.split(", ")
        rows.append(
            f"| {diversity.replace('_', ' ')} | {MEASURES[key]} | {group} ({found['n']}) | {found['rho']:.2f} "
            f"| {found['low']:.2f} to {found['high']:.2f} | {found['p']:.3f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("TOKDIV_DATA"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--num-images", type=int, default=None, help="images of the ranking [default: all]"
    )
    parser.add_argument("--work", default=ROOT / "runs" / "figure1", help="where students are kept")
    arguments = parser.parse_args()
    if arguments.data is None:
        print("skipped: set TOKDIV_DATA to the folder with the real images and weights")
        return
    result = measure(arguments)
    table = pd.DataFrame(result["teachers"]).rename(
        columns={"knn": "accuracy", "knn_low": "accuracy_low", "knn_high": "accuracy_high"}
    )
    figure = diversity_accuracy_figure(table, accuracy_label="k-NN accuracy of the student")
    for suffix in (".png", ".svg"):
        save_figure(figure, machine.RESULTS / f"figure1{suffix}")
    text = f"![Diversity of the teacher against accuracy of its student](figure1.png)\n\n{markdown(result)}"
    machine.write("figure1", "A more diverse teacher, a better student?", result, text)


if __name__ == "__main__":
    main()
