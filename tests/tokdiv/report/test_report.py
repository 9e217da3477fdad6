"""RUN/report.html: says what ranking.json says, loads nothing, and is written whatever the run is like."""

import json
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fakes import SIZE, coded_image, coded_tar, coded_teacher, numbers_in_order, similarities
from markupsafe import Markup
from PIL import Image

import tokdiv
import tokdiv.report.build
import tokdiv.report.maps
from tokdiv import cli
from tokdiv.data.open import open_source
from tokdiv.errors import RunError, UsageError
from tokdiv.hand_over import REPORT_FILES
from tokdiv.ranking import RankedTeacher
from tokdiv.report.build import write_report
from tokdiv.report.caveats import is_rectified
from tokdiv.report.evidence import trace_evidence
from tokdiv.report.page import MAX_SKIPPED, given_command, read_skipped, render
from tokdiv.scores import read_scores
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.text import printable

# Crops of a coded image do not hold its number.
TINY: dict[str, Any] = {
    "workers": 2,
    "dtype": "float32",
    "device": "cpu",
    "image_size": SIZE,
    "correspondence_images": 0,
}
COUNT = 200
COLUMNS = dict(zip(["x", "y", "z"], similarities(COUNT, 0.30, 0.303, 0.6)))
VOID = {"meta", "img", "br", "wbr", "source", "link", "input", "hr"}
LOADING = {"src", "srcset", "poster", "data", "action", "background"}


class Page(HTMLParser):
    """A page, read strictly: every element closed in its turn, no id twice, nothing loaded from elsewhere.

    Attributes: text, of all that is shown; rows, of each table the cells' texts; images, attributes of each.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.ids: set[str] = set()
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.images: list[dict[str, str | None]] = []
        self.commands: list[str] = []
        assert html.startswith("<!DOCTYPE html>")
        assert html.count("<html") == 1 and '<html lang="en">' in html
        self.feed(html)
        self.close()
        assert not self.open
        assert self.counts["h1"] == self.counts["title"] == self.counts["main"] == 1
        assert not {"script", "iframe", "link", "object", "embed"} & set(self.counts)
        assert "url(" not in html and "@import" not in html

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        given = dict(attrs)
        assert len(given) == len(attrs), f"<{tag}> has an attribute twice"
        assert not [name for name in given if name.startswith("on")], attrs
        for name in LOADING & set(given):
            assert (given[name] or "").startswith("data:image/"), f"{tag} {name}={given[name]}"
        if "id" in given:
            assert given["id"] not in self.ids
            self.ids.add(given["id"] or "")
        if tag == "img":
            assert given["alt"]
            self.images.append(given)
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "pre":
            self.commands.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag == "rect"

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "table" in self.open and self.open[-1] not in ("table", "thead", "tbody", "tr"):
            self.tables[-1][-1][-1] += data
        if "pre" in self.open:
            self.commands[-1] += data


def page_of(run: Path) -> Page:
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    page.text = " ".join(page.text.split())
    page.tables = [[[" ".join(c.split()) for c in row] for row in t] for t in page.tables]
    return page


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering takes longer than all else; one run's page is drawn."""

    def described(figure: Any, alt: str, *given: Any, **more: Any) -> Markup:
        return Markup('<img src="data:image/png;" alt="{}">').format(alt)

    for name in ("build", "correspondence", "evidence", "maps"):
        monkeypatch.setattr(f"tokdiv.report.{name}.inline_figure", described)
    monkeypatch.setattr(tokdiv.report.build, "save_figure", lambda figure, path: path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coded_tar(tmp_path_factory.mktemp("data") / "some images.tar", COUNT, broken=(3,))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole one, drawn: three teachers made in code, and two baselines."""
    folder = tmp_path_factory.mktemp("runs") / "RUN"
    teachers = [coded_teacher(name, column) for name, column in COLUMNS.items()]
    tokdiv.rank(data, [*teachers, "hog", "pixels"], folder, **TINY)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return page_of(run)


@pytest.fixture(scope="module")
def content(run: Path) -> dict[str, Any]:
    return json.loads((run / "ranking.json").read_text())


def minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


class TestPage:
    def test_the_answer_comes_first(self, page: Page, content: dict[str, Any]) -> None:
        best = next(t for t in content["teachers"] if t["name"] == content["best"])
        assert page.text.startswith("Best teacher: x Best teacher: x x has the most diverse tokens")
        answer = page.text[: page.text.index("Ranking Most diverse first")]
        assert f"token diversity {best['diversity']:.4f}" in answer
        assert f"(99% interval {best['ci_low']:.4f} to {best['ci_high']:.4f})" in answer
        (pair,) = [
            p for p in content["certificate"]["pairs"] if {p["first"], p["second"]} == {"x", "y"}
        ]
        assert pair["first"] == "x"
        assert f"The next, y, has a mean similarity {pair['gap']:.4f} higher" in answer
        assert "from 200 of 200 images" in answer

    def test_the_table_is_that_of_the_hand_over(self, page: Page, content: dict[str, Any]) -> None:
        head, *rows = page.tables[0]
        assert len(rows) == len(content["teachers"])
        for row, teacher in zip(rows, content["teachers"]):
            cells = dict(zip(head, row))
            assert cells["Rank"] == str(teacher["rank"])
            assert cells["Teacher"].startswith(teacher["name"])
            assert ("baseline" in cells["Teacher"]) == teacher["baseline"]
            assert ("best" in cells["Teacher"]) == (teacher["name"] == content["best"])
            assert cells["Diversity"] == minus(f"{teacher['diversity']:.4f}")
            assert cells["Similarity"] == minus(f"{teacher['mean_similarity']:.4f}")
            low, high = teacher["ci_low"], teacher["ci_high"]
            assert cells["Interval"] == minus(f"{low:.4f} to {high:.4f}")
            for column, key in (("Centred", "centred_similarity"), ("7x7", "similarity_7x7")):
                value = teacher[key]
                expected = "\N{EN DASH}" if value is None else minus(f"{value:.4f}")
                assert cells[column] == expected
            assert cells["Images"] == str(teacher["images"])
            assert float(cells["Images/s"].replace(",", "")) > 0
        head, *rows = page.tables[1]
        for row, teacher in zip(rows, content["teachers"]):
            cells = dict(zip(head, row))
            assert cells["K"] == str(teacher["spec"]["num_tokens"])
            assert cells["C"] == str(teacher["spec"]["dim"])

    def test_the_matrix_shows_every_pair_once(self, page: Page, content: dict[str, Any]) -> None:
        head, *rows = page.tables[2]
        names = [t["name"] for t in content["teachers"]]
        assert head[1:] == [f"{n + 2}. {name}" for n, name in enumerate(names[1:])]
        shown = {}
        for n, row in enumerate(rows):
            assert row[0] == f"{n + 1}. {names[n]}"
            for m, cell in enumerate(row[1:], start=1):
                assert bool(cell) == (m > n)
                if cell:
                    shown[names[n], names[m]] = cell
        assert len(shown) == len(content["certificate"]["pairs"]) == 10
        for pair in content["certificate"]["pairs"]:
            sign, ends = 1, (pair["low"], pair["high"])
            if (pair["first"], pair["second"]) not in shown:
                sign, ends = -1, (-pair["high"], -pair["low"])
            named = (pair["first"], pair["second"])[::sign]
            cell = shown[named]  # type: ignore[index]
            assert cell.startswith(pair["state"])
            assert minus(f"{sign * pair['gap']:+.4f}") in cell
            assert minus(f"{ends[0]:+.4f} to {ends[1]:+.4f}") in cell

    def test_pictures_are_inlined_and_described(self, page: Page, run: Path) -> None:
        assert len(page.images) == 3  # distributions, evidence, maps
        assert {str(image["src"])[:22] for image in page.images} >= {"data:image/png;base64,"}
        for image in page.images:
            assert "x" in str(image["alt"])
        assert (run / "report.html").stat().st_size < 3e6
        with Image.open(run / "similarity.png") as picture:
            assert min(picture.size) > 200
        assert "<svg" in (run / "similarity.svg").read_text()[:2000]

    def test_maps_are_of_the_lowest_the_median_and_the_highest_image(
        self, page: Page, run: Path, data: Path
    ) -> None:
        scores = pd.read_parquet(run / "scores.parquet").sort_values("x", kind="stable")
        for title, row in (("lowest", 0), ("median", (len(scores) - 1) // 2), ("highest", -1)):
            value, key = scores["x"].iloc[row], scores["key"].iloc[row]
            assert f"{title}: S = {value:.3f}, {key}" in page.text
        # And by the numbers that the images carry.
        numbers = [n for n in numbers_in_order(data) if n != 3]
        assert f"{min(numbers, key=lambda n: COLUMNS['x'][n]):04d}.png" in page.text

    def test_caveats_are_those_of_this_run(self, page: Page) -> None:
        assert "x 2, y 2" in page.text  # tokens
        assert "(hog)" not in page.text
        for paper in ("2209.03917", "2306.15876"):
            assert paper in page.text
        assert "No candidate is known to end in one" in page.text

    def test_skipped_images_settings_and_versions(
        self, page: Page, content: dict[str, Any]
    ) -> None:
        assert "1 of 200 images could not be used" in page.text
        assert re.search(r"some images.tar/0003.png: |0003.png: ", page.text)
        assert f"tokdiv {tokdiv.__version__}" in page.text
        size = content["settings"]["batch_size"]  # the one that "auto" came to
        assert isinstance(size, int)
        assert "confidence 0.99" in page.text and f"batch size {size} " in page.text
        assert "asked for" not in page.text

    def test_commands_can_be_typed(self, page: Page, run: Path, data: Path) -> None:
        pretrain, repeat = page.commands
        assert pretrain.startswith("import img2vec")  # the winner is a module of the user's own
        for text in (pretrain, repeat):
            compile(text, "the page", "exec")
        assert repr(str(data)) in pretrain and repr(str(data)) in repeat

    def test_the_evidence_is_that_of_the_certificate(
        self, run: Path, content: dict[str, Any]
    ) -> None:
        ranking = tokdiv.load_ranking(run)
        evidence = trace_evidence(ranking, read_scores(run, ranking.names, ranking.num_usable))
        assert evidence.images[0] == 64 and evidence.images[-1] == COUNT
        for pair in content["certificate"]["pairs"]:
            names = {pair["first"], pair["second"]}
            column = next(n for n, both in enumerate(evidence.pairs) if set(both) == names)
            values = evidence.log10[:, column]
            assert values[-1] == pytest.approx(pair["evidence"], rel=1e-9)
            assert (np.diff(values) >= 0).all()
            assert (evidence.decided[column] is not None) == (pair["state"] == "decided")


@pytest.mark.usefixtures("no_pictures")
class TestOddRuns:
    def ranked(self, folder: Path, data: Path, teachers: list[Any], **settings: Any) -> Page:
        tokdiv.rank(data, teachers, folder / "RUN", **{**TINY, **settings})
        return page_of(folder / "RUN")

    def test_names_are_text_and_never_markup(self, tmp_path: Path) -> None:
        label, key = "<script>alert('1')</script> < & $x$", "<img src=x onerror=alert(1)>\x07.png"
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name in (key, "plain.png", "<b>broken</b>.png"):
                member = tarfile.TarInfo(name)
                content = b"nothing" if "broken" in name else coded_image(len(name))
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
        column = similarities(COUNT, 0.5)[0]
        teachers = [coded_teacher(label, column), coded_teacher('"><b>', column)]
        page = self.ranked(tmp_path, tmp_path / "a.tar", teachers)
        assert label in page.text and '"><b>' in page.text
        assert key.replace("\x07", r"\x07") in page.text
        assert "<b>broken</b>.png" in page.text
        assert "b" not in page.counts and "script" not in page.counts

    def test_what_cannot_be_shown_is_spelled_out(self, run: Path, tmp_path: Path) -> None:
        # Every control character, bytes that are no UTF-8, an override of the direction of text.
        hostile = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0), 0xDCFF, 0xD800, 0x202E]))
        copy = shutil.copytree(run, tmp_path / "RUN")
        ranking = tokdiv.load_ranking(copy)
        ranking.data["source"] = hostile
        (copy / "skipped.csv").write_bytes(b"key,reason\na\xff\x07.png,torn\n")
        write_report(copy, ranking)
        html = (copy / "report.html").read_text(encoding="utf-8")
        assert printable(html) == html
        assert r"\x00\x01" in html and r"\x9f\xff\ud800\u202e" in html
        assert r"a\xff\x07.png" in html

    def test_dropped_teachers_have_no_scores_later_on(self, tmp_path: Path) -> None:
        count = 1200
        data = coded_tar(tmp_path / "a.tar", count)
        means = (0.300, 0.304, 0.5, 0.7)
        columns = similarities(count, *means)
        teachers = [coded_teacher(name, column) for name, column in zip("abcd", columns)]
        page = self.ranked(tmp_path, data, teachers, certify="best", tie=0.0)
        scores = pd.read_parquet(tmp_path / "RUN" / "scores.parquet")
        assert scores["d"].isna().any() and not scores["a"].isna().any()
        images = {row[1].partition(" ")[0]: row[-2] for row in page.tables[0][1:]}
        assert int(images["d"].replace(",", "")) == scores["d"].notna().sum()
        cells = {row[0]: row[1:] for row in page.tables[2][1:]}
        assert cells["3. c"][-1].startswith("decided") or cells["3. c"][-1].startswith("open")
        ranking = tokdiv.load_ranking(tmp_path / "RUN")
        scores = read_scores(tmp_path / "RUN", ranking.names, ranking.num_usable)
        evidence = trace_evidence(ranking, scores)
        for pair in ranking.certificate.pairs:
            names = {pair.first, pair.second}
            column = next(n for n, both in enumerate(evidence.pairs) if set(both) == names)
            last = evidence.log10[~np.isnan(evidence.log10[:, column]), column][-1]
            assert last == pytest.approx(pair.evidence, rel=1e-9)

    def test_what_follows_by_way_of_others_is_said(self, run: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(run, tmp_path / "RUN")
        content = json.loads((copy / "ranking.json").read_text())
        order = [t["name"] for t in content["teachers"]]
        for pair in content["certificate"]["pairs"]:
            ends = [order.index(pair["first"]), order.index(pair["second"])]
            pair["state"] = "decided" if abs(ends[0] - ends[1]) == 1 else "open"
            pair["first"], pair["second"] = (order[n] for n in sorted(ends))
        (copy / "ranking.json").write_text(json.dumps(content))
        write_report(copy)
        cells = page_of(copy).tables[2][1][1:]
        assert [cell.partition(" ")[0] for cell in cells] == ["decided", *["follows"] * 3]

    def test_a_single_teacher_has_nothing_to_be_compared_with(
        self, tmp_path: Path, data: Path
    ) -> None:
        page = self.ranked(tmp_path, data, [coded_teacher("x", COLUMNS["x"])])
        assert "it is the only candidate" in page.text
        assert len(page.tables) == 2 and len(page.images) == 2

    def test_one_image(self, tmp_path: Path) -> None:
        data = coded_tar(tmp_path / "a.tar", 1)
        page = self.ranked(tmp_path, data, [coded_teacher(n, COLUMNS[n]) for n in "xz"])
        assert "the only one: S = " in page.text
        assert "measured on every image, so exact" in page.text

    def test_correspondence_has_a_table_and_a_figure(self, tmp_path: Path, data: Path) -> None:
        page = self.ranked(tmp_path, data, ["pixels", "hog"], correspondence_images=4)
        assert "Are the tokens about the image?" in page.text
        head, *rows = next(table for table in page.tables if "Raw pixels" in table[0])
        teachers = json.loads((tmp_path / "RUN" / "ranking.json").read_text())["teachers"]
        for row, teacher in zip(rows, teachers, strict=True):
            cells = dict(zip(head, row))
            assert cells["Correspondence"] == f"{teacher['correspondence']:.3f}"
            assert cells["Raw pixels"] == f"{teacher['pixels_correspondence']:.3f}"
        assert any("Correspondence against" in str(image["alt"]) for image in page.images)

    def test_ties_are_no_order(self, tmp_path: Path) -> None:
        data = coded_tar(tmp_path / "a.tar", 100)
        teachers = [coded_teacher(name, COLUMNS["x"]) for name in "abc"]
        page = self.ranked(tmp_path, data, teachers)
        assert "a tie, as the gap is certified to be below 0.002" in page.text
        assert "The winner is tied with b, c" in page.text
        assert {cell.split()[0] for row in page.tables[2][1:] for cell in row[1:] if cell} == {
            "tie"
        }

    def test_baselines_alone(self, tmp_path: Path, data: Path) -> None:
        page = self.ranked(tmp_path, data, ["pixels", "hog"])
        assert "All candidates are baselines" in page.text
        assert "most diverse tokens of the candidates" in page.text
        assert shlex.split(page.commands[0]) == [
            *("img2vec", "pretrain", str(data)),
            *("--teacher", str(tmp_path / "RUN"), "-o", "runs/pretrain"),
        ]

    def test_a_baseline_above_the_only_trained_teacher(self, tmp_path: Path, data: Path) -> None:
        page = self.ranked(tmp_path, data, [coded_teacher("x", COLUMNS["z"]), "hog"])
        assert "no other candidate is a trained teacher" in page.text
        assert "The baseline hog stands above the winner" in page.text
        amounts = r"Above the winner: hog \(diversity \d\.\d{4}, the winner's 0\.\d{4}\)"
        assert re.search(amounts, page.text)

    def test_many_teachers_with_long_names(self, tmp_path: Path, data: Path) -> None:
        columns = similarities(COUNT, *np.linspace(0.3, 0.31, 12), sd=0.2)
        teachers = [
            coded_teacher(f"{n}_" + "long/name:" * 12, column) for n, column in enumerate(columns)
        ]
        page = self.ranked(tmp_path, data, teachers, max_images=100)
        assert len(page.tables[2]) == 12
        assert re.search(r"Not decided within \d+ images", page.text)
        assert re.search(r"\d+ more remarks of this kind", page.text)
        assert "Maps of 10 of the 12 teachers." in page.text
        assert "order not certified" in page.text.lower()

    def test_of_many_skipped_images_the_first_are_named(self, tmp_path: Path) -> None:
        data = coded_tar(tmp_path / "a.tar", 200, broken=range(0, 200, 2))
        page = self.ranked(tmp_path, data, [coded_teacher(n, COLUMNS[n]) for n in "xz"])
        images = json.loads((tmp_path / "RUN" / "ranking.json").read_text())["data"]
        assert f"{images['unusable']} of {images['images']} images could not be used" in page.text
        assert "the others are in skipped.csv" in page.text
        listed = page.text[page.text.index("Skipped images") : page.text.index("Pretrain with")]
        assert listed.count(".png: ") == MAX_SKIPPED

    def test_other_measures_are_compared_and_not_only_shown(
        self, run: Path, tmp_path: Path
    ) -> None:
        copy = shutil.copytree(run, tmp_path / "RUN")
        content = json.loads((copy / "ranking.json").read_text())
        values = {"x": (0.2, 0.1), "y": (0.1, 0.3), "z": (0.3, None)}
        for teacher in content["teachers"]:
            if teacher["name"] in values:
                centred, pooled = values[teacher["name"]]
                teacher |= {"centred_similarity": centred, "similarity_7x7": pooled}
        (copy / "ranking.json").write_text(json.dumps(content))
        write_report(copy)
        text = page_of(copy).text
        assert "y would come first: the order would change (y 0.1000, x 0.2000, z 0.3000)" in text
        assert "stays as it is (x 0.1000, y 0.3000). Without z" in text
        assert "Centred at its mean token, y would come first." in text


@pytest.mark.usefixtures("no_pictures")
class TestRebuilding:
    def test_teachers_made_in_code_leave_the_maps_to_the_others(
        self, run: Path, tmp_path: Path
    ) -> None:
        copy = shutil.copytree(run, tmp_path / "RUN")
        (copy / "report.html").unlink()
        assert write_report(copy, device="cpu") == copy / "report.html"
        text = page_of(copy).text
        for name in "xyz":
            assert f"Without {name}: it is a module of the user's own" in text
        assert "lowest: S = " in text

    @pytest.mark.parametrize("what", ["gone", "changed"])
    def test_without_the_data_the_page_has_no_maps(
        self, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        data = coded_tar(tmp_path / "a.tar", 70)
        tokdiv.rank(data, ["pixels", "hog"], tmp_path / "RUN", **TINY)
        assert "lowest: S = " in page_of(tmp_path / "RUN").text
        if what == "gone":
            data.unlink()
        else:
            coded_tar(data, 71)
        write_report(tmp_path / "RUN")
        text = page_of(tmp_path / "RUN").text
        said = {"gone": "no such folder or file", "changed": "holds other images now"}[what]
        assert "The page has no similarity maps: " in text and said in text
        assert "lowest: S = " not in text
        assert caplog.messages == []

    def test_weights_are_not_fetched_for_a_page(self, tmp_path: Path, data: Path) -> None:
        tokdiv.rank(data, ["pixels", "hog"], tmp_path / "RUN", **TINY)
        content = json.loads((tmp_path / "RUN" / "ranking.json").read_text())
        spec = content["teachers"][0]["spec"]
        spec |= {"architecture": "resnet18", "weights": "https://localhost:1/weights.pth"}
        (tmp_path / "RUN" / "ranking.json").write_text(json.dumps(content))
        write_report(tmp_path / "RUN")
        text = page_of(tmp_path / "RUN").text
        assert "https://localhost:1/weights.pth, are not on this machine" in text
        assert "lowest: S = " in text  # with the other one

    def test_a_stream_has_no_single_images(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = open_source(tokdiv.load_ranking(run).data["source"])
        source.permutable = False
        copy = shutil.copytree(run, tmp_path / "RUN")
        write_report(copy, source=source)
        assert "has no index to find single images by" in page_of(copy).text

    @pytest.mark.parametrize(
        ("spoil", "said"),
        [
            (lambda run: (run / "scores.parquet").unlink(), "no such file"),
            (lambda run: (run / "scores.parquet").write_text("no"), "does not hold the scores"),
            (lambda run: (run / "ranking.json").unlink(), "not finished"),
            (
                lambda run: pd.read_parquet(run / "scores.parquet")[:5].to_parquet(
                    run / "scores.parquet"
                ),
                "holds 5 images, the ranking was made of 199",
            ),
            (
                lambda run: (
                    pd.read_parquet(run / "scores.parquet")
                    .drop(columns="x")
                    .to_parquet(run / "scores.parquet")
                ),
                "does not hold the scores",
            ),
        ],
    )
    def test_a_run_without_its_parts_is_refused_in_a_line(
        self,
        run: Path,
        tmp_path: Path,
        spoil: Callable[[Path], Any],
        said: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        copy = shutil.copytree(run, tmp_path / "RUN")
        spoil(copy)
        monkeypatch.setattr(sys, "argv", ["tokdiv", "report", str(copy)])
        assert cli.run(cli.app) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and said in lines[0]

    def test_parts_that_only_tell_how_may_be_gone(self, run: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(run, tmp_path / "RUN")
        (copy / "config.json").unlink()
        (copy / "skipped.csv").unlink()
        write_report(copy)
        assert "1 of 200 images could not be used." in page_of(copy).text

    def test_the_command_prints_the_page(
        self,
        run: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        copy = shutil.copytree(run, tmp_path / "RUN")
        monkeypatch.setattr(sys, "argv", ["tokdiv", "report", str(copy)])
        assert cli.run(cli.app) == 0
        assert capsys.readouterr().out.strip() == str(copy / "report.html")

    def test_the_command_line_is_given_back_as_it_was(self, run: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(run, tmp_path / "a RUN")
        config = json.loads((copy / "config.json").read_text())
        words = ["rank", "my photos", "-t", "a=timm:x@it's.pth", "-o", "a RUN"]
        torchrun = ["torchrun", "--nproc-per-node", "8", "-m", "tokdiv"]
        for program, world, start in (
            ("/usr/bin/tokdiv", 1, ["tokdiv"]),
            ("/lib/tokdiv/__main__.py", None, ["tokdiv"]),  # of a config without it
            ("/lib/tokdiv/__main__.py", 8, torchrun),
        ):
            changed = {**config, "command": [program, *words], "world": world}
            (copy / "config.json").write_text(json.dumps(changed))
            write_report(copy)
            assert shlex.split(page_of(copy).commands[1]) == [*start, *words]

    @pytest.mark.parametrize(
        "words", [["--teacher-module", "my nets.py:make"], ["--teacher-module=my nets.py:make"]]
    )
    def test_a_winner_of_ones_own_file_is_pretrained_with_from_there(
        self, run: Path, tmp_path: Path, words: list[str], data: Path
    ) -> None:
        copy = shutil.copytree(run, tmp_path / "RUN")
        config = json.loads((copy / "config.json").read_text())
        command = ["/usr/bin/tokdiv", "rank", str(data), *words, "-t", "hog,pixels", "-o", "RUN"]
        (copy / "config.json").write_text(json.dumps({**config, "command": command}))
        write_report(copy)
        assert shlex.split(page_of(copy).commands[0]) == [
            *("img2vec", "pretrain", str(data)),
            *("--teacher-module", "my nets.py:make", "-o", "runs/pretrain"),
        ]
        # Of a script of the user's own the same words are not ours to read.
        (copy / "config.json").write_text(
            json.dumps({**config, "command": ["/home/me/rank.py", *command[1:]]})
        )
        write_report(copy)
        assert page_of(copy).commands[0].startswith("import img2vec")

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("hfds/someone/photos:split=test", "is not downloaded for a page"),
            ("wds/https://localhost:1/{0..9}.tar", "has no index to find single images by"),
            ("tfds/mnist", "has no index to find single images by"),
            ("hfids/someone/photos", "has no index to find single images by"),
        ],
    )
    def test_data_from_elsewhere_are_not_opened_for_a_page(
        self, run: Path, tmp_path: Path, name: str, said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokdiv.report.maps, "open_source", lambda data: pytest.fail("opened"))
        copy = shutil.copytree(run, tmp_path / "RUN")
        content = json.loads((copy / "ranking.json").read_text())
        content["data"]["source"] = name
        (copy / "ranking.json").write_text(json.dumps(content))
        write_report(copy)
        text = page_of(copy).text
        assert "The page has no similarity maps: " in text and said in text

    def test_what_a_scheme_names_on_this_machine_is_opened(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened: list[str] = []
        monkeypatch.setattr(tokdiv.report.maps, "open_source", opened.append)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "photos").mkdir()
        (tmp_path / "wds").mkdir()
        (tmp_path / "wds" / "a.tar").touch()  # a path that exists is no scheme
        names = [
            "hfds/photos",
            f"hfds/{tmp_path / 'photos'}:split=test",
            "wds/a.tar",
            "torch/mnist",
        ]
        for name in names:
            tokdiv.report.maps._open_again(name)
        assert opened == names


class TestRanking:
    def test_a_page_that_cannot_be_written_spoils_nothing(
        self,
        tmp_path: Path,
        data: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def fail(*given: Any, **more: Any) -> None:
            raise RunError("the disk is full\nand more")

        (tmp_path / "RUN").mkdir()
        monkeypatch.setattr(tokdiv.report.build, "write_report", fail)
        ranking = tokdiv.rank(data, ["pixels", "hog"], tmp_path / "R", **TINY)
        assert tokdiv.load_ranking(tmp_path / "R") == ranking
        line = caplog.messages[-1]
        assert "its report could not be written (the disk is full): `tokdiv report " in line
        # Nor does a page of an earlier end stay.
        for name in REPORT_FILES:
            (tmp_path / "R" / name).write_text("old")
        tokdiv.rank(data, ["pixels", "hog"], tmp_path / "R", **TINY)
        assert not [name for name in REPORT_FILES if (tmp_path / "R" / name).exists()]

    @pytest.mark.usefixtures("no_pictures")
    def test_a_teacher_that_fails_costs_only_the_maps(
        self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*given: Any) -> None:
            raise RuntimeError("out of memory\nand more")

        monkeypatch.setattr(tokdiv.report.maps, "measure_maps", fail)
        tokdiv.rank(data, ["pixels", "hog"], tmp_path / "R", **TINY)
        text = page_of(tmp_path / "R").text
        assert "The page has no similarity maps: RuntimeError: out of memory" in text


class TestReLU:
    """What the page says of a name against the tokens that the network gives."""

    @staticmethod
    def known(spec: TeacherSpec) -> bool:
        row = RankedTeacher("x", 1, False, spec, 0.5, 0.5, 0.4, 0.6, 64, "float32")
        return is_rectified(row)

    @pytest.mark.parametrize(
        "name",
        [
            *("resnet10t", "seresnext26d_32x4d", "ecaresnet26t", "skresnet18", "resnest14d"),
            *("res2net50_14w_8s", "legacy_seresnet18", "resnet18:blocks=2"),
            *("regnetx_002", "regnety_002", "repvgg_a0", "densenet121", "dla46x_c"),
        ],
    )
    def test_tokens_of_the_families_it_names_are_not_negative(self, name: str) -> None:
        architecture, _, options = name.partition(":")
        spec = f"timm:{architecture}@random" + (f":{options}" if options else "")
        teacher = tokdiv.load_teacher(spec, image_size=64)
        images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
        assert teacher(images).min() >= 0
        assert self.known(teacher.spec)

    @pytest.mark.parametrize("name", ["resnet33ts", "nf_resnet26", "regnetz_005", "test_vit"])
    def test_of_others_it_claims_nothing(self, name: str) -> None:
        teacher = tokdiv.load_teacher(f"timm:{name}@random", image_size=64)
        images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
        assert teacher(images).min() < 0
        assert not self.known(teacher.spec)

    @pytest.mark.parametrize(
        ("architecture", "fields", "expected"),
        [
            ("vit_base_resnet50d_224", {"norm": True}, False),
            ("vit_base_resnet50d_224", {}, False),
            ("resnet61q", {}, False),
            ("seresnext26ts", {}, False),
            ("resnetv2_50", {"block": 2}, False),
            ("cspresnet50", {}, False),
            ("densenet121", {"block": 1}, False),
            ("regnetv_040", {}, False),
            ("xception41p", {}, False),
            ("custom", {}, False),
            ("hog", {}, False),
            *((name, {}, True) for name in ("resnet50", "resnet50_clip", "resnet50.a1_in1k")),
            *((name, {}, True) for name in ("wide_resnet50_2", "vgg16_bn", "legacy_senet154")),
        ],
    )
    def test_names(self, architecture: str, fields: dict[str, Any], expected: bool) -> None:
        assert self.known(TeacherSpec("x", architecture, **fields)) is expected


def test_a_template_that_misses_something_says_so() -> None:
    with pytest.raises(Exception, match="is undefined"):
        render("ranking.html")


def test_unknown_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such ranking"):
        write_report(tmp_path / "nothing")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"command": None},
        {"command": ["tokdiv"]},
        {"command": "tokdiv rank"},
        {"command": ["-c", "rank"]},
        {"command": ["/lib/img2vec/__main__.py", "rank"]},
    ],
)
def test_only_a_command_line_of_ours_is_given_back(config: dict[str, Any]) -> None:
    assert given_command(config, "tokdiv") == []


def test_a_list_of_skipped_images_may_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "skipped.csv"
    assert read_skipped(path) == []
    path.write_bytes(b'key,reason\na.png,"torn, in two"\nb\xff.png,empty\nhalf')
    assert read_skipped(path) == [("a.png", "torn, in two"), ("b\\xff.png", "empty")]
    path.write_text('key,reason\na.png,"' + "x" * 200_000 + '"\n')  # too long for a field
    assert read_skipped(path) == []
