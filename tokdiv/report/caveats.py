"""What to weigh before trusting the order."""

import re

from tokdiv.ranking import RankedTeacher, Ranking

# timm's ResNets and RegNets whose stages end in a ReLU; those called 33ts, 61q and the like end in a SiLU.
RELU_STAGES = re.compile(
    r"(test_|wide_|legacy_)?(se|eca|sk)?(resnet|resnext|res2net|res2next|resnest)"
    r"(aa|blur|rs|light)?(?!v2|\d+ts|\d+q)|legacy_senet|regnet[xy]_"
)
RELU_LAST = re.compile(
    r"(rep)?vgg|densenet|dla|hrnet"
)  # networks whose last block alone is known to end in one
# Column of the ranking: its title, what was done to the tokens, and what a teacher without a value lacks.
OTHER_MEASURES = {
    "centred_similarity": (
        "Centred at the mean token",
        "With each teacher's mean token subtracted, which removes an offset that all of its tokens share,",
        "the mean token is that of the first 256 images, and the measure is taken on those after them",
    ),
    "similarity_7x7": (
        "Pooled to a 7x7 grid",
        "With the tokens of each teacher pooled to a 7x7 grid,",
        "it needs a grid of 7x7 tokens or more",
    ),
}
DOUBT = (
    "That diverse tokens make a good teacher is a finding of one paper (Img2Vec, arXiv 2304.12535). dBOT (arXiv "
    "2209.03917) finds that the choice of the teacher matters less at equal data and architecture, and hardly when "
    "each student in turn becomes the teacher of the next; Hybrid Distill (arXiv 2306.15876) looks at the "
    "diversity of attention heads instead. A ranking tells whose tokens are more diverse. Only pretraining tells "
    "which student is better."
)


def caveats(ranking: Ranking) -> list[tuple[str, str]]:
    """A heading and a paragraph each, with what it means for this ranking."""
    return [
        ("Floor of a ReLU", _relu_floor(ranking)),
        ("Number of tokens", _num_tokens(ranking)),
        *((title, _other_order(ranking, key)) for key, (title, _, _) in OTHER_MEASURES.items()),
        ("Baselines", _baselines(ranking)),
        ("A published doubt", DOUBT),
    ]


def _relu_floor(ranking: Ranking) -> str:
    text = (
        "Tokens that come out of a ReLU have no negative component, so even independent ones have a cosine of "
        "about 1/π = 0.318, where those of other networks have 0."
    )
    values = [
        f"{t.name} ({t.mean_similarity:.4f}"
        + (f", centred {t.centred_similarity:.4f})" if t.centred_similarity is not None else ")")
        for t in ranking.teachers
        if is_rectified(t)
    ]
    if not values:
        return f"{text} No candidate is known to end in one."
    return f"{text} Here this concerns {', '.join(values)}: their similarity overstates how alike the tokens are."


def is_rectified(teacher: RankedTeacher) -> bool:
    """Whether its tokens have no negative component: as measured, else by the name of the architecture in timm."""
    measured: bool | None = getattr(teacher, "rectified", None)
    if measured is not None:
        return measured
    spec = teacher.spec
    name = spec.architecture.lower()
    if spec.norm:  # a norm after it makes them negative again
        return False
    if RELU_STAGES.match(name):
        return True
    return spec.block is None and RELU_LAST.match(name) is not None


def _num_tokens(ranking: Ranking) -> str:
    counts = {t.spec.num_tokens for t in ranking.teachers}
    if len(counts) == 1:
        return f"Every candidate has {counts.pop()} tokens per image, so their number favors none."
    tokens = ", ".join(f"{t.name} {t.spec.num_tokens}" for t in ranking.teachers)
    return (
        f"The candidates differ in it ({tokens}), and the number of tokens alone moves the similarity: neighbors "
        f"on a finer grid are more alike. The 7x7 column compares on a common grid."
    )


def _other_order(ranking: Ranking, column: str) -> str:
    """Whether another measure would put the trained teachers in another order."""
    _, what, requirement = OTHER_MEASURES[column]
    order = ranking.order_by(column)
    trained = [t.name for t in ranking.teachers if not t.baseline]
    absent = [name for name in trained if name not in order]
    if len(trained) < 2:
        return "There are no two trained teachers to order by it."
    if len(order) < 2:
        return f"Too few values to order trained teachers by this column: {requirement}."
    here = [name for name in trained if name in order]
    values = ", ".join(f"{name} {getattr(ranking[name], column):.4f}" for name in order)
    if order == here:
        text = f"{what} the order of the trained teachers stays as it is ({values})."
    elif order[0] == here[0]:
        text = f"{what} the winner stays, and the order of the other trained teachers changes ({values})."
    else:
        text = f"{what} {order[0]} would come first: the order would change ({values})."
    return text + (f" Without {', '.join(absent)}: {requirement}." if absent else "")


def _baselines(ranking: Ranking) -> str:
    best = ranking[ranking.best_name]
    above = [t for t in ranking.teachers if t.baseline and t.rank < best.rank]
    if above:
        values = ", ".join(
            f"{t.name} (diversity {t.diversity:.4f}, the winner's {best.diversity:.4f})"
            for t in above
        )
        return (
            f"Above the winner: {values}. They are not chosen: raw signals and untrained networks are diverse "
            f"without meaning. Token diversity ranks trained teachers; it does not make one."
        )
    if best.baseline:
        return "The winner itself is a baseline: diverse, but nothing has been learned in it."
    if any(t.baseline for t in ranking.teachers):
        return "None of those measured ranks above the winner."
    return "None was measured: add -t pixels,hog to see where they rank."
