"""Data sets of other packages: Hugging Face, torchvision, TensorFlow."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_files import keys, png, refusal, write
from PIL import Image

from tokdiv.data.loader import read_batches
from tokdiv.data.open import open_source


@pytest.fixture
def hugging_face(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["cat", "dog"]), "image": datasets.Image()}
    )
    rows = [{"bytes": png(n), "path": f"{n % 8}.png"} for n in range(10)]
    return datasets.Dataset.from_dict(
        {"label": [n % 2 for n in range(10)], "image": rows}, features=features
    )


def check_hugging_face(source) -> None:
    assert source.count == 10
    assert source.permutable
    assert source.labels.tolist() == [0, 1] * 5
    assert source.classes == ["cat", "dog"]
    assert keys(source)[:3] == ["0.png", "1.png", "2.png"]
    assert source.key(8) == "0.png#2"
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, range(10))) == [png(n) for n in range(10)]


def test_a_hugging_face_data_set_from_disk(hugging_face, tmp_path):
    hugging_face.save_to_disk(str(tmp_path / "saved"))
    source = open_source(f"hfds/{tmp_path / 'saved'}")
    check_hugging_face(source)
    hugging_face.save_to_disk(str(tmp_path / "again"))
    assert open_source(f"hfds/{tmp_path / 'again'}").fingerprint == source.fingerprint


def test_splits_of_a_hugging_face_data_set(hugging_face, tmp_path):
    import datasets

    splits = datasets.DatasetDict(train=hugging_face.select([0]), test=hugging_face)
    splits.save_to_disk(str(tmp_path / "saved"))
    check_hugging_face(open_source(f"hfds/{tmp_path / 'saved'}:split=test"))
    assert "['train', 'test']" in refusal(f"hfds/{tmp_path / 'saved'}:split=val")


def test_a_folder_of_parquet_files(hugging_face, tmp_path):
    (tmp_path / "parquet").mkdir()
    hugging_face.to_parquet(str(tmp_path / "parquet" / "train-0.parquet"))
    check_hugging_face(open_source(f"hfds/{tmp_path / 'parquet'}"))
    assert "val" in refusal(f"hfds/{tmp_path / 'parquet'}:split=val")


def test_a_hugging_face_image_folder_is_read_from_its_files(hugging_face, tmp_path):
    write(tmp_path / "images", {"cat/1.png": png(1), "dog/2.png": png(2)})
    source = open_source(f"hfds/{tmp_path / 'images'}")
    assert sorted(keys(source)) == ["cat/1.png", "dog/2.png"]
    assert source.read(keys(source).index("dog/2.png")) == png(2)


def test_a_hugging_face_stream_is_told_its_length(hugging_face, tmp_path):
    (tmp_path / "set").mkdir()
    hugging_face.to_parquet(str(tmp_path / "set" / "train-0.parquet"))
    data = f"hfids/{tmp_path / 'set'}"
    assert "num_samples=N" in refusal(data)
    for wrong in ("0", "many"):
        assert "with N of 1 or more" in refusal(f"{data}:num_samples={wrong}")
    assert "hfids/NAME:num_samples" in refusal("tfds/mnist:num_samples=3")
    source = open_source(f"{data}:num_samples={len(hugging_face)}")
    assert source.count == len(list(source.stream(0))) == len(hugging_face)
    assert not source.permutable


@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary"])
@pytest.mark.parametrize("column", ["image", "picture_of_it"])
def test_parquet_of_other_writers(hugging_face, tmp_path, kind, column):
    """pandas and pyarrow write no metadata that says which column holds images, or what a label means."""
    import pyarrow
    from pyarrow import parquet

    contents = [png(n) for n in range(10)]
    if kind == "struct":
        cells = pyarrow.array([{"bytes": content, "path": None} for content in contents])
    else:
        cells = pyarrow.array(contents, getattr(pyarrow, kind)())
    numbers = pyarrow.array([n % 3 for n in range(10)], pyarrow.int32())
    (tmp_path / "set").mkdir()
    table = pyarrow.table({"id": list("abcdefghij"), column: cells, "label": numbers})
    parquet.write_table(table, tmp_path / "set" / "train-0.parquet")
    for data in (f"hfds/{tmp_path / 'set'}", str(tmp_path / "set")):
        source = open_source(data)
        assert source.count == 10
        assert source.labels is not None
        assert source.labels.tolist() == [n % 3 for n in range(10)]
        assert source.classes is None
        assert [source.read(n) for n in range(10)] == contents


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        (["dog", "cat", None, "dog"], [1, 0, -1, 1], ["cat", "dog"]),
        ([2, None, 2, 0], [2, -1, 2, 0], None),
        ([0.5, 1.0, 2.0, 3.0], None, None),
        ([2**63, 1, 2, 3], None, None),
        ([[1], [2], [3], [4]], None, None),
    ],
    ids=["texts", "missing", "floats", "beyond int64", "lists"],
)
def test_labels_that_are_no_class_labels(hugging_face, tmp_path, values, labels, classes):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "set").mkdir()
    column = pyarrow.array(values, pyarrow.uint64() if values[0] == 2**63 else None)
    table = pyarrow.table({"image": [png(n) for n in range(4)], "label": column})
    parquet.write_table(table, tmp_path / "set" / "train-0.parquet")
    source = open_source(f"hfds/{tmp_path / 'set'}")
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert source.classes == classes


def test_of_several_columns_of_images_one_is_named(hugging_face, tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "set").mkdir()
    masks, images = [[png(n + k) for n in range(2)] for k in (5, 0)]
    table = pyarrow.table({"mask": masks, "image": images})
    parquet.write_table(table, tmp_path / "set" / "train-0.parquet")
    source = open_source(f"hfds/{tmp_path / 'set'}")
    assert source.read(1) == images[1]
    assert "of the columns mask, image, the images of 'image' are used" in (source.warning or "")
    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "set" / "train-0.parquet")
    assert "has no column of images, only a" in refusal(f"hfds/{tmp_path / 'set'}")


def test_parts_of_a_split(hugging_face, tmp_path):
    import datasets

    (tmp_path / "parquet").mkdir()
    hugging_face.to_parquet(str(tmp_path / "parquet" / "train-0.parquet"))
    hugging_face.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=hugging_face, test=hugging_face).save_to_disk(str(tmp_path / "two"))
    for folder in ("parquet", "one", "two"):
        data = f"hfds/{tmp_path / folder}:split=train"
        assert keys(open_source(data)) == keys(open_source(f"hfds/{tmp_path / folder}"))
        parts = {"[:50%]": range(5), "[8:]": range(8, 10), "[20%:40%]": range(2, 4), "[3]": None}
        for part, indices in parts.items():
            if indices is None:
                assert f"{folder}:split=train[3]" in refusal(data + part)
                continue
            source = open_source(data + part)
            assert [source.read(n) for n in range(source.count or 0)] == [png(n) for n in indices]
    assert open_source(f"hfds/{tmp_path / 'two'}:split=train+test[:30%]").count == 13
    assert open_source(f"hfds/{tmp_path / 'two'}:split=test[:10%]:root={tmp_path}").count == 1


def test_a_data_set_without_rows_is_one_line(hugging_face, tmp_path):
    hugging_face.select([]).save_to_disk(str(tmp_path / "none"))
    for data in (f"hfds/{tmp_path / 'none'}", str(tmp_path / "none")):
        assert "holds no images: the split 'train' has no rows" in refusal(data)
    hugging_face.save_to_disk(str(tmp_path / "some"))
    assert "has no rows" in refusal(f"hfds/{tmp_path / 'some'}:split=train[:0]")


def test_a_folder_of_save_to_disk_is_taken_as_a_plain_path(hugging_face, tmp_path):
    hugging_face.save_to_disk(str(tmp_path / "saved"))
    check_hugging_face(open_source(str(tmp_path / "saved")))


def test_rows_without_an_image_are_unusable(hugging_face, tmp_path):
    import pyarrow
    from pyarrow import parquet

    os.mkfifo(tmp_path / "pipe.png")
    rows = [{"bytes": png(1), "path": None}, None, {"bytes": None, "path": f"{tmp_path}/pipe.png"}]
    (tmp_path / "set").mkdir()
    parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "set" / "train-0.parquet")
    source = open_source(f"hfds/{tmp_path / 'set'}")
    (batch,) = read_batches(source, None, [np.arange(3)], {8}, workers=1)
    assert batch.reasons == [
        None,
        "the data set holds no image in this row",
        "not a regular file",
    ]


def test_an_unknown_or_unreachable_hugging_face_data_set_is_one_line(hugging_face):
    assert "hfds/nobody/nothing-here" in refusal("hfds/nobody/nothing-here")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install tokdiv[hf]" in refusal("hfds/name")
    pytest.importorskip("timm")
    if "tensorflow_datasets" not in sys.modules:
        assert "tensorflow" in refusal("tfds/mnist")


def test_a_torchvision_data_set(tmp_path):
    write(tmp_path, {"a/1.png": png(1), "b/2.png": png(2), "b/3.png": png(3)[:-20]})
    source = open_source(f"torch/image_folder:root={tmp_path}")
    assert source.count == 3
    assert source.permutable
    assert source.classes == ["a", "b"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 1]
    assert keys(source) == ["0", "1", "2"]
    batch = next(read_batches(source, None, [np.arange(2)], [8], workers=2))
    assert batch.usable.all()
    assert batch.views[8][1, 0].unique().tolist() == [2]
    message = refusal(f"torch/cifar10:root={tmp_path}:split=test")
    assert "cifar10" in message
    assert ":root=" in message
    assert "cannot be opened" in refusal("torch/unheard_of")


def test_what_timm_reads_as_a_stream(monkeypatch):
    import timm.data

    class Stream:
        def __iter__(self):
            for n in range(30):
                yield Image.new("RGB", (4, 4), (n, 0, 0)), n

    opened = []

    def create_dataset(name, **options):
        opened.append((name, options["split"]))
        return Stream()

    monkeypatch.setattr(timm.data, "create_dataset", create_dataset)
    source = open_source("tfds/mnist:split=test")
    assert opened == [("tfds/mnist", "test")]
    assert source.count is None
    assert not source.permutable
    first = [key for key, _ in source.stream(1)]
    assert sorted(first, key=int) == [str(n) for n in range(30)]
    assert first != sorted(first, key=int)
    assert first == [key for key, _ in source.stream(1)]
    batch = next(read_batches(source, None, [np.arange(5)], [8], workers=2, seed=1))
    assert batch.keys == first[:5]
    assert batch.views[8][:, 0, 0, 0].tolist() == [int(key) for key in first[:5]]
