"""Classes: where they come from, how two data sets agree on them, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from img2vec.evaluate import load_encoder, open_labeled, split_labeled
from img2vec.evaluate.labeled import split_labels
from tokdiv.data.open import open_source
from tokdiv.errors import UsageError


def folders(root: Path, counts: dict[str, int]) -> str:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(root / name / f"{number}.png")
    return str(root)


def test_classes_are_matched_by_name(tmp_path):
    train = folders(tmp_path / "train", {"ant": 2, "bee": 1, "cow": 3})
    val = folders(tmp_path / "val", {"bee": 2, "cow": 1})
    train_data, val_data = open_labeled(train, val)
    assert train_data.labels.tolist() == [0, 0, 1, 2, 2, 2]
    assert val_data.labels.tolist() == [1, 1, 2]  # train's numbers, not val's own 0 and 1
    assert val_data.classes == ["ant", "bee", "cow"]


def test_a_class_that_train_lacks_is_named(tmp_path):
    train = folders(tmp_path / "train", {"ant": 1, "bee": 1})
    val = folders(tmp_path / "val", {"bee": 1, "cow": 1})
    with pytest.raises(UsageError, match=r"'.*val' has classes that '.*train' lacks: cow"):
        open_labeled(train, val)


def test_a_folder_without_classes_is_refused_in_one_line(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(UsageError, match="has no classes, which an evaluation needs") as error:
        open_labeled(str(tmp_path), str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_single_class_is_refused(tmp_path):
    train = folders(tmp_path / "train", {"ant": 3})
    with pytest.raises(UsageError, match=r"one class only \('ant'\)"):
        open_labeled(train, train)


def test_labels_below_zero_are_refused(tmp_path, monkeypatch):
    from img2vec.evaluate.labeled import labeled

    source = open_source(folders(tmp_path / "train", {"ant": 1, "bee": 1}))
    source.labels = np.array([-1, 0])
    with pytest.raises(UsageError, match="1 of 2 images have no class"):
        labeled(source)


def test_numbers_serve_where_there_are_no_names(tmp_path):
    from img2vec.evaluate.labeled import labeled

    source = open_source(folders(tmp_path / "train", {"ant": 1, "bee": 2}))
    source.classes = None
    assert labeled(source).classes == ["0", "1"]
    source.labels = np.array([10**9, 7, 10**9])  # identifiers
    data = labeled(source)
    assert data.classes == ["7", "1000000000"]
    assert data.labels.tolist() == [1, 0, 1]


def test_a_stream_is_refused():
    from img2vec.evaluate.labeled import labeled
    from tokdiv.data.loader import Source

    with pytest.raises(UsageError, match="is a stream"):
        labeled(Source("wds/shards", None, "", permutable=False))


def test_split_holds_out_a_share_of_every_class(tmp_path):
    data = folders(tmp_path / "data", {"ant": 10, "bee": 1, "cow": 5})
    kept, held_out = split_labeled(open_source(data), fraction=0.2, seed=3)
    assert np.bincount(kept.labels).tolist() == [8, 1, 4]
    assert np.bincount(held_out.labels).tolist() == [2, 0, 1]
    assert sorted([*kept.indices, *held_out.indices]) == list(range(16))
    labels = np.repeat([0, 1], [50, 50])
    first, again, other = (split_labels(labels, 0.5, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("model", ["runs/none", Path("none")])
def test_a_model_that_does_not_exist_is_named(model):
    with pytest.raises(UsageError, match=f"'{model}': no such file or folder; expected OUT"):
        load_encoder(model)


def test_a_class_token_is_a_feature_of_a_vit_alone(tiny):
    import torch

    mean, cls = (
        load_encoder(tiny, dtype="float32"),
        load_encoder(tiny, feature="cls", dtype="float32"),
    )
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    pixels = (images.float() - mean.mean) / mean.std
    expected = mean.module.forward_features(pixels)
    torch.testing.assert_close(cls(images).mean(dim=1), expected[:, 0])
    torch.testing.assert_close(mean(images).mean(dim=1), expected[:, 1:].mean(dim=1))
    with pytest.raises(UsageError, match="has no class token: use --feature mean"):
        load_encoder("timm:resnet18@random:size=32", feature="cls")
