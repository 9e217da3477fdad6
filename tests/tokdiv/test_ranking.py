"""RUN/ranking.json: the hand-over holds what the contract says, and comes back as it was."""

import csv
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fakes import SIZE, coded_tar, coded_teacher, similarities

import tokdiv
from tokdiv import Teacher, run_config
from tokdiv.certify import certify_order
from tokdiv.config import Settings
from tokdiv.data.open import open_source
from tokdiv.errors import RunError, UsageError
from tokdiv.run_dir import open_run_dir
from tokdiv.tables import ranking_text

COUNT = 200
TINY = {"workers": 2, "dtype": "float32", "device": "cpu", "image_size": SIZE, "report": False}
COLUMNS = similarities(COUNT, 0.30, 0.303, 0.6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    data = coded_tar(folder / "images.tar", COUNT, broken=(3,))
    teachers = [coded_teacher(name, column) for name, column in zip("xyz", COLUMNS)]
    tokdiv.rank(data, [*teachers, "hog", "pixels"], folder / "RUN", **TINY)
    return folder / "RUN"


@pytest.fixture(scope="module")
def content(run: Path) -> dict:
    return json.loads(
        (run / "ranking.json").read_text(),
        parse_constant=lambda text: pytest.fail(f"{text} is no JSON"),
    )


def test_run_holds_the_files_of_the_contract(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "ranking.json",
        "ranking.csv",
        "scores.parquet",
        "skipped.csv",
        "config.json",
    }
    assert [name for name in names if name.startswith(".")] == [".lock"]  # no temporary files


def test_fields_of_the_hand_over(content: dict) -> None:
    assert set(content) == {
        "schema_version",
        "data",
        "settings",
        "certificate",
        "teachers",
        "best",
    }
    assert {"source", "count", "fingerprint"} <= set(content["data"])
    assert content["data"]["count"] == COUNT
    assert {"certified", "confidence", "pairs"} <= set(content["certificate"])
    assert content["certificate"]["confidence"] == 0.99
    required = {
        "name",
        "rank",
        "baseline",
        "spec",
        "mean_similarity",
        "diversity",
        "ci_low",
        "ci_high",
    }
    for place, teacher in enumerate(content["teachers"], start=1):
        assert required | {"images", "centred_similarity", "similarity_7x7"} <= set(teacher)
        assert teacher["rank"] == place
        assert teacher["diversity"] == pytest.approx(1 - teacher["mean_similarity"])
        assert teacher["ci_low"] <= teacher["mean_similarity"] <= teacher["ci_high"]
        assert teacher["images"] == COUNT - 1
        assert {"architecture", "weights", "sha256", "mean", "std", "size"} <= set(teacher["spec"])
    assert content["best"] == "x"
    assert {t["name"] for t in content["teachers"] if t["baseline"]} == {"hog", "pixels"}


def test_pairs_name_the_more_diverse_teacher_first(content: dict) -> None:
    pairs = content["certificate"]["pairs"]
    assert len(pairs) == 10
    means = {t["name"]: t["mean_similarity"] for t in content["teachers"]}
    for pair in pairs:
        assert pair["state"] in ("decided", "tie", "open")
        gap = means[pair["second"]] - means[pair["first"]]
        assert pair["gap"] == pytest.approx(gap, abs=1e-6)
        assert pair["low"] <= pair["gap"] <= pair["high"]
    states = {frozenset((p["first"], p["second"])): p["state"] for p in pairs}
    assert states[frozenset("xz")] == "decided"


def test_the_spreadsheet_is_the_same_table(run: Path, content: dict) -> None:
    table = pd.read_csv(run / "ranking.csv")
    for column in ("name", "rank", "baseline", "images"):
        assert table[column].tolist() == [t[column] for t in content["teachers"]]
    for column in ("mean_similarity", "diversity", "ci_low", "ci_high"):
        expected = [t[column] for t in content["teachers"]]
        np.testing.assert_allclose(table[column], expected, rtol=1e-12)


def test_skipped_images_are_quoted_as_csv(run: Path) -> None:
    with (run / "skipped.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["key", "reason"] and len(rows) == 2 and len(rows[1]) == 2
    assert rows[1][0].endswith("0003.png")


def test_config_tells_how_it_was_made(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert {"command", "data", "settings", "teachers", "versions"} <= set(config)
    assert config["settings"]["seed"] == 0
    assert {"tokdiv", "torch", "timm"} <= set(config["versions"])


def test_config_tells_of_how_many_processes_it_was(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert json.loads((run / "config.json").read_text())["world"] == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    source = open_source(str(run.parent / "images.tar"))
    assert (
        run_config.describe(source, Settings(), [tokdiv.TeacherSpec("x", "hog")], {})["world"] == 3
    )


@pytest.mark.parametrize(
    ("size", "expected"), [(16, 16), ("auto", None), (None, None), (True, None), (-1, None)]
)
def test_the_batch_size_of_a_run(
    run: Path, tmp_path: Path, size: object, expected: int | None
) -> None:
    config = json.loads((run / "config.json").read_text())
    config["settings"]["batch_size"] = size
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_config.read_previous(tmp_path).batch_size == expected
    for damaged in (
        "{}",
        '{"settings": null}',
        '{"settings": [], "images_per_second": {}}',
        "[",
        "\xff",
    ):
        (tmp_path / "config.json").write_text(damaged)
        assert run_config.read_previous(tmp_path) == run_config.Previous(None, {})
    assert run_config.read_previous(tmp_path / "gone") == run_config.Previous(None, {})


def test_a_run_has_one_writer_at_a_time(run: Path, tmp_path: Path) -> None:
    data = run.parent / "images.tar"
    settings = {**TINY, "max_images": 8}
    with open_run_dir(tmp_path / "RUN", lambda config: None, resume=True):
        for resume in (True, False):
            with pytest.raises(UsageError, match="another process is writing to it; wait for it"):
                tokdiv.rank(data, ["hog"], tmp_path / "RUN", resume=resume, **settings)
    tokdiv.rank(data, ["hog"], tmp_path / "RUN", **settings)
    assert not list(tmp_path.glob("RUN.bak*"))


def test_a_ranking_comes_back_as_it_was(run: Path, content: dict) -> None:
    for path in (run, run / "ranking.json", str(run)):
        ranking = tokdiv.load_ranking(path)
        assert ranking.to_dict() == {**content, "teachers": ranking.to_dict()["teachers"]}
        assert json.loads(json.dumps(ranking.to_dict())) == content
    assert isinstance(ranking.best, tokdiv.TeacherSpec) and ranking.best.name == "x"
    assert ranking.table["name"].tolist() == [t["name"] for t in content["teachers"]]
    hog = tokdiv.load_teacher(ranking["hog"].spec)
    assert (hog.num_tokens, hog.dim, hog.size) == (4, 108, SIZE)


def change(key: str, value: object) -> Callable[[dict], dict]:
    return lambda content: {**content, key: value}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (change("schema_version", 99), "has schema version 99, expected 1"),
        (change("teachers", [{"name": "x"}]), "is no ranking of tokdiv"),
        (change("best", "nobody"), "its best, 'nobody', is none of its teachers"),
        (lambda content: {}, "is no ranking of tokdiv"),
        (lambda content: [], "is no ranking of tokdiv"),
    ],
)
def test_what_is_no_ranking_is_refused(
    content: dict, tmp_path: Path, edit: Callable[[dict], dict], said: str
) -> None:
    (tmp_path / "ranking.json").write_text(json.dumps(edit(content)))
    with pytest.raises(UsageError, match=said):
        tokdiv.load_ranking(tmp_path)
    (tmp_path / "ranking.json").write_text("{")
    with pytest.raises(UsageError, match="is no ranking of tokdiv"):
        tokdiv.load_ranking(tmp_path)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone", tmp_path / "gone.json"):
        with pytest.raises(UsageError, match="no such ranking"):
            tokdiv.load_ranking(path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="not finished"):
        tokdiv.load_ranking(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="a run of img2vec pretrain, no ranking"):
        tokdiv.load_ranking(tmp_path)


def test_how_fast_it_was_is_known_afterwards(run: Path, tmp_path: Path) -> None:
    names = {"x", "y", "z", "hog", "pixels"}
    rates = tokdiv.load_ranking(run).rates
    assert set(rates) == names and all(rate > 0 for rate in rates.values())
    # Repeated, nothing is measured any more; what is added has a rate of its own.
    teachers = [coded_teacher(name, column) for name, column in zip("xyz", COLUMNS)]
    again = tokdiv.rank(run.parent / "images.tar", [*teachers, "hog", "pixels"], run, **TINY)
    assert again.rates == tokdiv.load_ranking(run).rates == rates
    # The hand-over alone does not tell.
    (tmp_path / "ranking.json").write_bytes((run / "ranking.json").read_bytes())
    assert tokdiv.load_ranking(tmp_path).rates == {}


def test_one_teacher_has_no_order(run: Path) -> None:
    data = run.parent / "images.tar"
    alone = tokdiv.rank(data, [coded_teacher("x", COLUMNS[0])], **TINY)
    assert alone.verdict() == "Measured on 200 of 200 images, scored in float32."


def test_what_unusable_images_leave_open_no_further_image_decides(run: Path) -> None:
    data = run.parent / "images.tar"
    twins = [coded_teacher(name, COLUMNS[0]) for name in "ab"]
    ranking = tokdiv.rank(data, twins, certify="none", **TINY)
    assert ranking.pair("a", "b").state == "open"
    assert any("no image is left" in remark for remark in ranking.remarks())


def test_for_the_winner_only_pairs_of_those_that_may_win_are_open_questions(run: Path) -> None:
    columns = similarities(COUNT, 0.30, 0.302, 0.8, 0.801)
    teachers = [coded_teacher(name, column) for name, column in zip("abcd", columns)]
    ranking = tokdiv.rank(
        run.parent / "images.tar", teachers, certify="best", max_images=100, **TINY
    )
    still_open = {
        frozenset((pair.first, pair.second))
        for pair in ranking.certificate.pairs
        if pair.state == "open"
    }
    assert {frozenset("ab"), frozenset("cd")} <= still_open
    said = [remark for remark in ranking.remarks() if remark.startswith("Not decided")]
    assert len(said) == 1 and "a before b" in said[0]


def test_teachers_of_ones_own_are_said_to_need_their_code(run: Path) -> None:
    remarks = tokdiv.load_ranking(run).remarks()
    said = "is made by code of your own: it cannot be loaded again without that code."
    assert [remark for remark in remarks if said in remark] == [f"{name} {said}" for name in "xyz"]


def test_what_beats_a_winner_beats_whom_it_beat() -> None:
    """1 beats 2, which is then dropped before 0 could be compared to it; later 0 beats 1."""
    scores = np.tile([0.3, 0.3, 0.6], (1000, 1))
    scores[:, 0] = np.where(np.arange(1000) < 35, 0.4, 0.0)
    scores[35:, 2] = np.nan
    certificate = certify_order(scores, 1000, 0.2, 0.0)
    states = {(pair.first, pair.second): pair.state for pair in certificate.pairs}
    assert states == {(0, 1): "decided", (1, 2): "decided", (0, 2): "open"}
    assert certificate.decided() == {(0, 1), (1, 2), (0, 2)}
    assert certificate.best_of([0, 1, 2]) == [0]


@pytest.mark.parametrize(("eligible", "best"), [([0, 1, 2], [0]), ([1, 2], [1]), ([2], [2])])
def test_the_best_is_the_one_that_is_settled_against_all_eligible(
    eligible: list[int], best: list[int]
) -> None:
    scores = np.tile([0.1, 0.4, 0.7], (500, 1))
    certificate = certify_order(scores, 500, 0.01, 0.002)
    assert certificate.best_of(eligible) == best


def test_equal_teachers_are_both_the_best() -> None:
    scores = np.tile([0.1, 0.1, 0.7], (500, 1))
    certificate = certify_order(scores, 500, 0.01, 0.002)
    assert certificate.best_of([0, 1, 2]) == [0, 1]


class TestDeadTeachers:
    """A network whose tokens are zero has similarity 0: it would win if it could."""

    data_count = 100

    @pytest.fixture(scope="class")
    def data(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return coded_tar(tmp_path_factory.mktemp("dead") / "images.tar", self.data_count)

    @staticmethod
    def dying(share: float) -> Teacher:
        """Four tokens an image, of which the first are zero in so many of the images."""

        def tokens(images: torch.Tensor) -> torch.Tensor:
            found = torch.nn.functional.avg_pool2d(images + 1, 16).flatten(2).transpose(1, 2)
            zero = (images[:, :, 0, 0] * 1000).sum(dim=1).long() % 100 < 100 * share
            return torch.where(zero[:, None, None], 0.0, found)

        return Teacher(torch.nn.Identity(), tokens=tokens, size=SIZE, name="dying")

    @pytest.mark.parametrize("certify", ["order", "best", "none"])
    def test_a_teacher_of_zero_tokens_does_not_win(
        self, data: Path, tmp_path: Path, certify: str
    ) -> None:
        dead = Teacher(torch.nn.Conv2d(3, 4, 16, 16), size=SIZE, name="dead")
        for parameter in dead.module.parameters():
            parameter.zero_()
        alive = coded_teacher("alive", COLUMNS[2])
        ranking = tokdiv.rank(data, [dead, alive], tmp_path / "RUN", certify=certify, **TINY)
        assert ranking.best_name == "alive" and ranking.eligible == ["alive"]
        assert ranking["dead"].zero_tokens == 1 and ranking["alive"].zero_tokens == 0
        assert ranking["dead"].rank == 1  # it is shown where it stands
        assert "dead cannot win: 100% of its tokens are zero" in " ".join(ranking.remarks())
        assert tokdiv.load_ranking(tmp_path / "RUN") == ranking
        assert ranking["alive"].images >= 64  # and it was not dropped for the dead one

    def test_if_no_other_may_win_the_run_ends_early_and_says_why(
        self, data: Path, tmp_path: Path
    ) -> None:
        teachers = ["pixels", self.dying(0.5)]
        with pytest.raises(
            RunError, match=r"dying: more than 1% of the tokens are zero.*another -o"
        ):
            tokdiv.rank(data, teachers, tmp_path / "RUN", certify="none", **TINY)
        assert not (tmp_path / "RUN" / "ranking.json").exists()
        allowed = tokdiv.rank(data, teachers, certify="none", allow_baselines=True, **TINY)
        assert allowed.best_name == "pixels"

    def test_a_few_zero_tokens_do_not_matter(self, data: Path) -> None:
        ranking = tokdiv.rank(data, [self.dying(0.01), coded_teacher("a", COLUMNS[0])], **TINY)
        assert ranking["dying"].zero_tokens <= 0.01
        assert set(ranking.eligible) == {"dying", "a"}

    def test_flat_images_do_not_make_hog_ineligible(self, data: Path) -> None:
        ranking = tokdiv.rank(data, ["hog"], **TINY)  # images of one color have no gradients
        assert ranking["hog"].zero_tokens == 1 and ranking.best_name == "hog"


DAMAGES: list[Any] = [
    None,
    -1,
    0,
    1.5,
    float("nan"),
    "",
    "x",
    [],
    {},
    [[]],
    True,
    10**400,
    "\ud800",
]


def test_a_damaged_ranking_is_refused_in_one_line_or_shown(
    run: Path, content: dict, tmp_path: Path
) -> None:
    """Every value is replaced by others, every entry removed: a ranking is read, or a UsageError says why not."""
    copy = tmp_path / "RUN"
    copy.mkdir()
    refused = shown = 0
    generator = random.Random(0)
    for path in places(content):
        for damage in ["gone", *generator.sample(DAMAGES, 3)]:
            damaged = replaced(content, path, damage)
            (copy / "ranking.json").write_text(json.dumps(damaged))
            try:
                ranking = tokdiv.load_ranking(copy)
            except UsageError as error:
                refused += len(str(error).splitlines()) == 1
                continue
            shown += 1
            ranking.remarks(), ranking.verdict(), ranking.table, ranking_text(ranking, copy)
            ranking.pair(*ranking.names[:2])
            json.dumps(ranking.to_dict())
    assert refused > 500 and shown > 50  # of a spec, many fields may be anything


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    content = json.loads(json.dumps(content))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value == "gone":
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content
