"""COCO JSON: what is read, matched, left out and refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_shapes import change, disc, make_coco, run_lengths
from pycocotools import mask as coco_mask

from img2vec.evaluate.coco import open_coco, rle_counts
from img2vec.evaluate.detection_data import decode_masks, read_sample
from tokdiv.errors import UsageError


@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path, 4, empty=(1,), crowd=(2,))


def json_of(notation: str) -> Path:
    return Path(notation.partition(":annotations=")[2])


def test_objects_are_read_with_gaps_in_the_categories_closed(coco):
    data = open_coco(coco)
    assert data.classes == ["box", "disc"]
    assert data.num_objects.tolist() == [2, 0, 2, 2]
    assert data.num_crowds.tolist() == [0, 0, 1, 0]
    assert data.used_classes == {"box", "disc"}
    assert data.training_indices().tolist() == [0, 1, 2, 3]
    content = json.loads(json_of(coco).read_text())
    for position in range(len(data)):
        sample = read_sample(data, position)
        own = [a for a in content["annotations"] if a["image_id"] == 100 + position]
        assert sample.image.shape == (3, 48, 64)
        assert sample.target["labels"].tolist() == [{3: 1, 17: 2}[a["category_id"]] for a in own]
        assert sample.target["iscrowd"].tolist() == [a["iscrowd"] for a in own]
        for box, mask, found in zip(sample.target["boxes"], sample.target["masks"], own):
            x, y, w, h = found["bbox"]
            assert box.tolist() == pytest.approx([x, y, x + w, y + h], abs=1e-4)
            assert abs(int(mask.sum()) - found["area"]) <= 2


def test_an_image_of_crowds_alone_is_not_trained_on(coco):
    # Image 1 gets nothing but a crowd: as a negative it would teach that the crowd is background.
    def move(content):
        content["annotations"][-3:] = [
            {**a, "image_id": 101} if a["iscrowd"] else a for a in content["annotations"][-3:]
        ]
        content["annotations"] = [
            {**a, "image_id": 101} if a["iscrowd"] else a for a in content["annotations"]
        ]

    assert open_coco(change(coco, move)).training_indices().tolist() == [0, 2, 3]


def test_masks_are_those_of_pycocotools(tmp_path):
    size = (40, 50)
    shape = disc((20.3, 15.8), 9.2, size)
    polygon = [[3.0, 4.0, 30.5, 6.0, 20.0, 33.0], [32.0, 2.0, 45.0, 2.0, 45.0, 12.0, 32.0, 12.0]]
    rle = {"size": list(size), "counts": run_lengths(shape)}
    compressed = coco_mask.encode(np.asfortranarray(shape.astype(np.uint8)))
    text = {"size": list(size), "counts": compressed["counts"].decode()}
    masks = decode_masks([polygon, rle, text], *size)
    assert masks.shape == (3, *size) and masks.dtype == torch.uint8
    assert np.array_equal(masks[1].numpy(), shape)
    assert np.array_equal(masks[2].numpy(), shape)
    parts = coco_mask.frPyObjects(polygon, *size)
    expected = coco_mask.decode(parts).any(axis=2)
    assert np.array_equal(masks[0].numpy(), expected)
    assert decode_masks([], *size).shape == (0, *size)


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_are_read_as_pycocotools_writes_them(seed):
    draw = np.random.default_rng(seed)
    mask = draw.random((37, 53)) < draw.random()
    counts = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert rle_counts(counts) == run_lengths(mask)


def test_run_lengths_that_end_within_a_number_are_not_taken():
    assert min(rle_counts("o")) < 0  # an `o` asks for more


def test_boxes_without_area_and_masks_that_cannot_be_used_are_left_out_and_counted(coco):
    def spoil(content):
        own = content["annotations"]
        own[0]["bbox"] = [5, 5, 0, 9]
        own[1]["bbox"] = [70, 5, 9, 9]  # right of the image
        own[2]["segmentation"] = [[1, 1, 2, 2]]
        own[3]["segmentation"] = {"size": [48, 64], "counts": [10, 20]}  # too short
        own[4]["segmentation"] = {"size": [64, 48], "counts": own[3].get("counts", [3072])}
        own[5]["image_id"] = 999

    data = open_coco(change(coco, spoil))
    assert data.left_out == {"no_area": 2, "no_mask": 3, "no_image": 1}
    assert data.num_objects.sum() + data.num_crowds.sum() == 1


def test_boxes_are_clipped_to_the_image(coco):
    def move(content):
        content["annotations"][0]["bbox"] = [-5, -3, 30, 100]

    sample = read_sample(open_coco(change(coco, move)), 0)
    assert sample.target["boxes"][0].tolist() == [0, 0, 25, 48]


def test_classes_of_val_are_matched_by_name(coco, tmp_path):
    other = make_coco(tmp_path / "other", 2)

    def swap(content):
        content["categories"] = [{"id": 1, "name": "disc"}, {"id": 2, "name": "box"}]
        for found in content["annotations"]:
            found["category_id"] = {17: 1, 3: 2}[found["category_id"]]

    data = open_coco(change(other, swap), open_coco(coco).classes)
    assert data.classes == ["box", "disc"]
    assert read_sample(data, 0).target["labels"].tolist() == [1, 2]


def test_a_class_that_train_lacks_is_an_error_where_it_has_objects(coco, tmp_path):
    other = make_coco(tmp_path / "other", 2)

    def add(content):
        content["categories"].append({"id": 40, "name": "kite"})

    assert open_coco(change(other, add), ["box", "disc"]).classes == ["box", "disc"]
    with pytest.raises(
        UsageError, match="has objects of classes that the training data lack: disc"
    ):
        open_coco(other, ["box", "kite"])


def test_missing_files_are_counted_and_named(coco):
    folder = Path(coco.partition(":annotations=")[0])
    (folder / "001.png").unlink()
    data = open_coco(coco)
    assert data.missing == ["001.png"]
    assert len(data) == 3
    assert data.record(1)["file"] == "002.png"
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UsageError, match=r"none of the 4 images that .* names is in .*'000.png'"):
        open_coco(coco)


def test_an_image_of_another_size_than_the_json_says_is_not_used(coco):
    def widen(content):
        content["images"][0]["width"] = 65
        content["annotations"][1]["segmentation"]["size"] = [48, 65]

    sample = read_sample(open_coco(change(coco, widen)), 0)
    assert sample.image is None
    assert sample.reason == "has 64 x 48 pixels, and 65 x 48 in the JSON"


def test_a_damaged_image_is_not_used(coco):
    path = Path(coco.partition(":annotations=")[0]) / "000.png"
    path.write_bytes(path.read_bytes()[:100])
    sample = read_sample(open_coco(coco), 0)
    assert sample.image is None and sample.reason == "truncated PNG"


def with_content(text: str):
    def write(coco: str) -> str:
        json_of(coco).write_text(text)
        return coco

    return write


def edited(edit):
    return lambda coco: change(coco, edit)


BAD = {
    "no option": (lambda c: c.partition(":")[0], "expected IMAGES_FOLDER:annotations=FILE.json"),
    "no folder": (lambda c: "nowhere:annotations=x.json", "no folder 'nowhere'"),
    "no file": (lambda c: c + "x", "no file '.*jsonx'"),
    "not JSON": (with_content("hello"), "is no COCO JSON: Expecting value"),
    "a list": (with_content("[]"), "is no COCO JSON: no JSON object"),
    "results": (with_content('{"images": []}'), "it has no annotations"),
    "deep": (with_content("[" * 100_000), "is no COCO JSON: nested too deeply"),
    "huge number": (with_content('{"images": [' + "9" * 5000 + "]}"), "is no COCO JSON: Exceeds"),
    "image without size": (
        edited(lambda c: c["images"][1].pop("width")),
        "entry 1 of images is malformed .no 'width'.",
    ),
    "huge image": (
        edited(lambda c: c["images"][1].update(width=10**9)),
        "entry 1 of images is malformed .1000000000 x 48 pixels.",
    ),
    "file outside": (
        edited(lambda c: c["images"][0].update(file_name="../x.png")),
        "file_name '../x.png' lies outside of the folder",
    ),
    "absolute file": (
        edited(lambda c: c["images"][0].update(file_name="/etc/passwd")),
        "lies outside of the folder",
    ),
    "image twice": (
        edited(lambda c: c["images"].append(c["images"][0])),
        "two images have the same id",
    ),
    "category twice": (
        edited(lambda c: c["categories"].append({"id": 3, "name": "kite"})),
        "two categories have the id 3",
    ),
    "name twice": (
        edited(lambda c: c["categories"].append({"id": 4, "name": "box"})),
        "two categories have the name 'box'",
    ),
    "unknown category": (
        edited(lambda c: c["annotations"][0].update(category_id=5)),
        "an object has the category 5, which is not listed",
    ),
    "box of text": (
        edited(lambda c: c["annotations"][2].update(bbox="abcd")),
        "entry 2 of annotations is malformed",
    ),
    "box of three": (
        edited(lambda c: c["annotations"][2].update(bbox=[1, 2, 3])),
        "entry 2 of annotations is malformed",
    ),
    "text for an object": (
        edited(lambda c: c["annotations"].append("x")),
        "entry 6 of annotations is malformed|entry 7 of annotations is malformed",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(coco, case):
    spoil, message = BAD[case]
    with pytest.raises(UsageError, match=message) as raised:
        open_coco(spoil(coco))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e400])
def test_numbers_that_are_not_finite_make_no_box(coco, value):
    data = open_coco(change(coco, lambda c: c["annotations"][0].update(bbox=[value, 1, 5, 5])))
    assert data.left_out == {"no_area": 1}
