"""OUT/report.html: its numbers are those of metrics.jsonl, and it loads nothing."""

import html
import json
import re
import shlex
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from small import SMALL, make_teacher

import img2vec
import img2vec.report as module
import img2vec.step as step
from img2vec.figures import MAX_POINTS, loss_figure, read_metrics, watch_figure
from img2vec.report import write_report
from img2vec.token_maps import colors_of
from tokdiv.errors import Interrupted, UsageError


def _pretrain(data, out, teacher="pixels", **options):
    return img2vec.pretrain(data, teacher, out, **(SMALL | options))


def _page(out: Path) -> str:
    return (out / "report.html").read_text(encoding="utf-8")


def _text(page: str) -> str:
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.S).replace("</td>", " ")
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", body)).split())


def _loaded(page: str) -> list[str]:
    """Whatever a browser would fetch: sources, style sheets, urls of the style."""
    found: list[str] = re.findall(r"url\(([^)]*)\)", page)

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            given = dict(attributes)
            names = ("src", "srcset", "data", "poster") + (("href",) if tag != "a" else ())
            found.extend(given[name] for name in names if given.get(name))
            assert tag not in ("script", "iframe", "object", "embed")

    Reader().feed(page)
    return found


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "with classes"
    _pretrain(photos, out, knn_every=2)
    return out


def test_its_numbers_are_those_of_the_metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    text = _text(_page(run))
    assert f"After {len(steps)} steps, in epoch 4 of 4, the loss is {steps[-1]['loss']:.4f}" in text
    assert f"it began at {steps[0]['loss']:.4f}" in text
    measured = [line for line in lines if "knn_accuracy" in line]
    assert f"Online k-NN accuracy: {100 * measured[-1]['knn_accuracy']:.1f}% at step 24" in text
    for line in measured:
        assert f"{line['step']} {line['epoch'] + 1} {100 * line['knn_accuracy']:.1f}%" in text
    similarity = [line["token_similarity"] for line in steps if "token_similarity" in line][-1]
    assert f"own tokens: {similarity:.4f}".replace("-", "\N{MINUS SIGN}") in text
    rate = float(np.median([line["images_per_second"] for line in steps]))
    assert f"Median {rate:,.1f} images/s" in text
    assert "No step was skipped. Every image that was read could be used." in text
    assert "asked for" not in text


def test_it_loads_nothing_and_shows_the_tokens(run):
    page = _page(run)
    assert all(source.startswith("data:") for source in _loaded(page))
    assert page.count("<figure>") == 3
    assert "What the student predicts" in page and "no token maps" not in page
    names = re.findall(r"<li><code>([^<]*\.png)</code>", page)
    assert len(names) == len(set(names)) == 4


def test_it_says_how_to_go_on_to_evaluate_and_to_load(run):
    text = html.unescape(_page(run))
    for task in ("knn", "probe", "finetune"):
        assert f"img2vec {task} '{run}' --train TRAIN --val VAL -o '{run}-{task}'" in text
    assert f"timm.create_model('local-dir:{run}/student', pretrained=True)" in text
    code = re.search(r"<code>(import json.*?)</code>", _page(run), re.S)  # started from Python
    assert code is not None
    before = (run / "metrics.jsonl").read_bytes()
    exec(html.unescape(code[1]), {})  # and goes on where the run stands: at its end
    assert (run / "metrics.jsonl").read_bytes() == before


def test_it_is_written_again_from_the_folder_alone(run):
    first = _page(run)
    (run / "report.html").unlink()
    assert write_report(run) == run / "report.html"
    assert _text(_page(run)) == _text(first)
    assert _page(run).count("<figure>") == 3


def test_without_classes_with_one_step_and_a_teacher_of_the_users_own(photos, tmp_path):
    out = tmp_path / "run"
    teacher = make_teacher(stride=32, dim=2)  # 2 x 2 tokens of two channels: fewer than three
    _pretrain(photos / "disc", out, teacher, max_steps=1, mask_unit=32)
    text = _text(_page(out))
    assert "After 1 step, in epoch 1 of 4" in text and "k-NN" not in text
    assert _page(out).count("<figure>") == 3
    assert "img2vec.pretrain(" in text and "made by your own code" in text
    # From the folder alone there is no such teacher, and the page says so.
    write_report(out)
    assert "no token maps: 'small' is a module of the user's own" in _text(_page(out))
    assert write_report(out, teacher=teacher) and _page(out).count("<figure>") == 3


def test_a_stream_of_shards(photos, tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number, path in enumerate(sorted(photos.rglob("*.png"))):
            entry = tarfile.TarInfo(f"{number:03d}.png")
            entry.size = path.stat().st_size
            tar.addfile(entry, io.BytesIO(path.read_bytes()))
    _pretrain(f"wds/{tmp_path / 'shard.tar'}", tmp_path / "run", max_steps=2, epoch_size=8)
    page = _page(tmp_path / "run")
    assert page.count("<figure>") == 3 and "no token maps" not in page


def test_hostile_names_are_text(photos, tmp_path):
    hostile = '<img src=x onerror=alert(1)>&".png'
    data = tmp_path / "<script>alert(2)<"
    data.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))[:3]):
        shutil.copy(path, data / f"{number}{hostile}")
    (data / f"broken {hostile}").write_bytes(b"nothing")
    _pretrain(data, tmp_path / "run", epochs=1)
    page = _page(tmp_path / "run")
    assert all(source.startswith("data:") for source in _loaded(page))
    assert "<script" not in page and "<img src=x" not in page
    assert hostile in html.unescape(page) and "1 image could not be used" in _text(page)
    assert f"broken {hostile}" in html.unescape(page)


def test_data_that_are_gone_cost_the_maps_alone(photos, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(photos / "disc", data)
    _pretrain(data, tmp_path / "run", max_steps=2)
    shutil.rmtree(data)
    write_report(tmp_path / "run")
    assert "The page has no token maps" in _text(_page(tmp_path / "run"))
    assert _page(tmp_path / "run").count("<figure>") == 2


def test_a_page_that_cannot_be_written_is_only_a_warning(photos, tmp_path, monkeypatch, caplog):
    def full(*arguments, **options):
        raise OSError(28, "No space\nleft on device")

    monkeypatch.setattr(module, "write_report", full)
    result = _pretrain(photos, tmp_path / "run", max_steps=1)
    assert (result.student / "model.safetensors").is_file()
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert "No space" in warning
    assert f"img2vec.report.write_report({str(tmp_path / 'run')!r}) tries again" in warning


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no run of img2vec pretrain"):
        write_report(tmp_path)


def test_colors_are_the_principal_components_and_predictions_take_the_same():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([5.0, 3.0, 2.0, 0.1, 0.1])
    targets = torch.randn(2, 50, 5, generator=generator) * scale
    masked = torch.stack([torch.arange(0, 20), torch.arange(10, 30)])
    hidden = targets.gather(1, masked[..., None].expand(-1, -1, 5))
    shown, guessed = colors_of(targets, hidden, masked)
    for image in range(2):
        np.testing.assert_allclose(guessed[image, masked[image]], shown[image, masked[image]])
    assert np.isnan(guessed).all(axis=2).sum() == 60
    assert shown.min() == 0 and shown.max() == 1
    # Against the covariance's eigenvectors: an affine map of each component, up to its sign.
    flat = targets.double().flatten(0, 1)
    vectors = torch.linalg.eigh(torch.cov(flat.T)).eigenvectors.flip(1)[:, :3]
    components = ((flat - flat.mean(0)) @ vectors).numpy()
    inside = ((shown > 0) & (shown < 1)).reshape(-1, 3)
    for channel in range(3):
        rows = inside[:, channel]
        pair = components[rows, channel], shown.reshape(-1, 3)[rows, channel]
        assert abs(np.corrcoef(*pair)[0, 1]) == pytest.approx(1, abs=1e-9)


def test_colors_are_computed_where_float64_is_known():
    class OnMPS(torch.Tensor):
        """As a tensor on MPS: no float64 but on the CPU."""

        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    targets, masked = torch.randn(2, 9, 4), torch.arange(5).expand(2, 5)
    hidden = targets.gather(1, masked[..., None].expand(-1, -1, 4))
    expected = colors_of(targets, hidden, masked)
    found = colors_of(targets.as_subclass(OnMPS), hidden.as_subclass(OnMPS), masked)
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one, other)


def test_the_command_line_is_given_back_as_it_was(run):
    config = json.loads((run / "config.json").read_text())
    words = ["pretrain", "my photos", "-t", "hog", "-o", "a run"]
    for world, start in (
        (1, "img2vec"),
        (4, "torchrun --nproc-per-node 4 -m img2vec"),
    ):
        changed = config | {"command": ["/lib/img2vec/__main__.py", *words], "world": world}
        assert module._pretrain_command(run, changed).text == f"{start} {shlex.join(words)}"


def test_an_interrupted_run_has_a_page(photos, tmp_path, monkeypatch):
    out, whole = tmp_path / "run", step.image_losses

    def interrupt(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return whole(*arguments)

    monkeypatch.setattr(step, "image_losses", interrupt)
    with pytest.raises(Interrupted):
        _pretrain(photos / "disc", out)
    text = _text(_page(out))
    assert "After 1 step, in epoch 1 of 4" in text and "no token maps" not in text
    assert "The run is not finished: it writes the student at its end." in text
    monkeypatch.undo()
    _pretrain(photos / "disc", out)
    assert "The run is not finished" not in _text(_page(out))


def test_long_runs_are_thinned_and_keep_their_range(tmp_path):
    lines = [
        {"step": n, "loss": 1 / n, "patch_loss": 0.5 / n, "global_loss": 0.0, "lr": 1e-3,
         "images_per_second": 9.0}
        for n in range(1, 20_001)
    ]  # fmt: skip
    for figure in (loss_figure(lines), watch_figure(lines)):
        for axes in figure.axes:
            assert all(len(line.get_xdata()) <= MAX_POINTS for line in axes.lines)
    labels = [line.get_label() for line in loss_figure(lines).axes[0].lines]
    assert "global loss" not in labels  # off, it is 0 throughout
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
