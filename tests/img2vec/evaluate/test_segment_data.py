"""SEG: what the numbers of masks mean, layouts of data sets, and one line for each mistake."""

import csv
import errno
import io
import logging

import numpy as np
import pytest
from PIL import Image
from shapes import SEGMENTER, draw_shapes, save

from img2vec.evaluate.confusion import IGNORED
from img2vec.evaluate.masks import decode_mask
from img2vec.evaluate.segment import segment
from img2vec.evaluate.segmentation_data import open_segmentation
from img2vec.evaluate.segmentation_sources import open_pairs
from tokdiv.data.decode import UnusableImage
from tokdiv.dist import current_processes
from tokdiv.errors import RunError, UsageError


def opened(train, val=None):
    return open_segmentation(str(train), str(val or train), current_processes(), workers=2)


def encoded(values, mode=None, file_format="PNG", **options):
    image = values if isinstance(values, Image.Image) else Image.fromarray(np.asarray(values), mode)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def flat_folder(root, masks, size=None):
    """images/ and annotations/ without splits, from arrays of class numbers."""
    for number, mask in enumerate(masks):
        mask = np.asarray(mask, np.uint8)
        height, width = size or mask.shape
        save(root / "images" / f"{number}.jpg", np.full((height, width, 3), 100))
        save(root / "annotations" / f"{number}.png", mask)
    return root


# Masks -------------------------------------------------------------------------------------------


VALUES = np.array([[0, 1, 2], [3, 1, 0]])


def test_masks_of_every_kind_hold_the_numbers_of_the_file():
    palette = Image.fromarray(VALUES.astype(np.uint8)).convert("P")
    palette.putdata(VALUES.ravel().tolist())
    palette.putpalette([200, 10, 10, 20, 220, 30, 40, 40, 230, 90, 90, 90])
    files = {
        "8 bits": encoded(VALUES.astype(np.uint8)),
        "16 bits": encoded(VALUES.astype(np.uint16)),
        "palette": encoded(palette),
        "palette of 2 bits": encoded(palette, bits=2),
        "TIFF of 16 bits": encoded(VALUES.astype(np.uint16), file_format="TIFF"),
        "BMP": encoded(VALUES.astype(np.uint8), file_format="BMP"),
    }
    for kind, file in files.items():
        assert decode_mask(file, kind).tolist() == VALUES.tolist(), kind
    large = np.array([[0, 300, 65_535]])
    assert decode_mask(encoded(large.astype(np.uint16)), "16").tolist() == large.tolist()
    assert (
        decode_mask(encoded(VALUES.astype(bool)), "1").tolist() == (VALUES > 0).astype(int).tolist()
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_gray_samples_below_8_bits_are_not_spread_over_the_range(bits):
    # Pillow cannot write them: the palette's file with another color type has the same samples.
    import struct
    import zlib

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    values = [0, 1, 2, 3]
    packed = sum(v << (8 - bits * (n + 1)) for n, v in enumerate(values) if bits == 2)
    rows = bytes([0, packed]) if bits == 2 else bytes([0, 0x01, 0x23])
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0))
    file += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert decode_mask(file, "gray").tolist() == [values]


def test_masks_that_do_not_keep_numbers_are_refused_and_say_how_to_convert():
    color = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UsageError, match=r"'m.png' is a color image \(RGB\).*Image.fromarray"):
        decode_mask(encoded(color), "m.png")
    with pytest.raises(UsageError, match="color image"):
        decode_mask(encoded(color.convert("LA")), "m.png")
    with pytest.raises(UsageError, match=r"JPEG.*save masks as PNG"):
        decode_mask(encoded(VALUES.astype(np.uint8), file_format="JPEG"), "m.jpg")
    with pytest.raises(UsageError, match="floating-point"):
        decode_mask(encoded(VALUES.astype(np.float32), file_format="TIFF"), "m.tif")
    with pytest.raises(UsageError, match="holds the number 70000"):
        decode_mask(Image.fromarray(np.array([[0, 70_000]], np.int32)), "m.tif")
    with pytest.raises(UnusableImage, match="cannot be decoded"):
        decode_mask(encoded(VALUES.astype(np.uint8))[:40], "m.png")


# Folders -----------------------------------------------------------------------------------------


def test_labels_of_a_folder_with_splits(tmp_path):
    root = draw_shapes(tmp_path / "data", {"train": 3, "val": 2})
    train, val, notes = opened(f"{root}:split=train", f"{root}:split=val")
    assert (len(train), len(val), train.classes, notes) == (3, 2, ["0", "1", "2"], [])
    assert [train.key(n) for n in range(3)] == ["0.png", "1.png", "2.png"]
    for data in (train, val):
        for position in range(len(data)):
            path = root / "annotations" / ("train" if data is train else "val") / data.key(position)
            values = np.array(Image.open(path)).astype(int)
            assert np.array_equal(data.labels(position), np.where(values == 255, IGNORED, values))
            assert (
                tuple(data.image(position).shape[1:]) == tuple(data.sizes[position]) == values.shape
            )
    assert train.pixels.sum() == sum((train.labels(n) != IGNORED).sum() for n in range(3))
    same, _, _ = opened(f"{root}:split=train")
    assert same.pairs.fingerprint == train.pairs.fingerprint != val.pairs.fingerprint


@pytest.mark.parametrize("reduce", ["false", "true"])
@pytest.mark.parametrize("ignore", ["255", "2", "0/2"])
def test_ignored_numbers_and_reduce_zero_label_against_a_loop(tmp_path, reduce, ignore):
    masks = [[[0, 1, 2, 3], [255, 3, 1, 0]], [[1, 1, 3, 3], [2, 2, 0, 0]]]
    if "255" not in ignore:
        masks[0][1][0] = 0
    root = flat_folder(tmp_path / "data", masks)
    data, _, _ = opened(f"{root}:ignore={ignore}:reduce_zero_label={reduce}")
    for position, mask in enumerate(masks):
        for y, row in enumerate(mask):
            for x, value in enumerate(row):
                expected = value - (reduce == "true")
                if str(value) in ignore.split("/") or expected < 0:
                    expected = IGNORED
                assert data.labels(position)[y, x] == expected, (value, reduce, ignore)
    assert data.num_classes == 3 + (reduce == "false")


def test_ade20k_as_it_is_unpacked(tmp_path, caplog):
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        for number in range(2):
            stem = f"ADE_{split}_{number:08d}"
            save(root / "images" / split / f"{stem}.jpg", np.full((6, 8, 3), 90))
            mask = np.arange(48).reshape(6, 8) % 4
            save(root / "annotations" / split / f"{stem}.png", mask)
    names = ["Idx\tRatio\tTrain\tVal\tName"]
    names += [
        f"{n}\t0.1\t9\t9\t{name}" for n, name in enumerate(("wall", "building, edifice", "sky"), 1)
    ]
    (root / "objectInfo150.txt").write_text("\n".join(names) + "\n")
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\n")
    seg = f"{root}:split=training:reduce_zero_label=true"
    train, val, notes = opened(seg, seg.replace("training", "validation"))
    assert train.classes == val.classes == ["wall", "building", "sky"] and not notes
    assert train.labels(0)[0, :4].tolist() == [IGNORED, 0, 1, 2]
    train, _, notes = opened(f"{root}:split=training")
    assert train.classes == ["other", "wall", "building", "sky"]
    assert "reduce_zero_label=true leaves it out" in notes[0] and "0 in ADE20K" in caplog.text


def test_names_of_the_classes_come_from_a_file(tmp_path):
    root = flat_folder(tmp_path / "data", [[[0, 1], [1, 0]]])
    (tmp_path / "names.txt").write_text("road\nsky\ncar\n")
    (tmp_path / "names.json").write_text('{"0": "road", "1": "sky"}')
    assert opened(f"{root}:classes={tmp_path / 'names.txt'}")[0].classes == ["road", "sky", "car"]
    assert opened(f"{root}:classes={tmp_path / 'names.json'}")[0].classes == ["road", "sky"]
    (root / "classes.txt").write_text("a\nb\n")
    assert opened(root)[0].classes == ["a", "b"]
    with pytest.raises(UsageError, match=r"cannot read names of classes from '.*none.txt'"):
        opened(f"{root}:classes={tmp_path / 'none.txt'}")
    with pytest.raises(UsageError, match="name other classes"):
        opened(root, f"{root}:classes={tmp_path / 'names.json'}")


def test_a_path_that_looks_like_an_option_wins(tmp_path):
    root = flat_folder(tmp_path / "data:split=odd", [[[0, 1], [1, 0]]])
    assert len(opened(root)[0]) == 1


# Other packages' data sets -----------------------------------------------------------------------


def test_pascal_voc(tmp_path):
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("a", "b"):
        save(voc / "JPEGImages" / f"{name}.jpg", np.full((4, 6, 3), 90))
        save(voc / "SegmentationClass" / f"{name}.png", [[0, 15, 255, 20, 0, 0]] * 4)
    split = voc / "ImageSets" / "Segmentation"
    split.mkdir(parents=True)
    (split / "train.txt").write_text("a\nb\n")
    (split / "val.txt").write_text("b\n")
    seg = f"torch/VOCSegmentation:root={tmp_path}"
    train, val, _ = opened(seg, f"{seg}:split=val")
    assert (len(train), len(val), train.num_classes) == (2, 1, 21)
    assert train.classes[15] == "person" and train.labels(0)[0].tolist() == [0, 15, -1, 20, 0, 0]
    assert train.key(0) == "VOCdevkit/VOC2012/JPEGImages/a.jpg"
    with pytest.raises(UsageError, match=r"torchvision cannot open it.*nothing is downloaded"):
        opened(f"torch/voc:root={tmp_path / 'none'}")


def test_cityscapes_has_its_19_classes(tmp_path):
    city = "gtFine/train/aachen/aachen_000000_000019_gtFine_"
    save(
        tmp_path / "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png",
        np.zeros((2, 4, 3)),
    )
    save(tmp_path / f"{city}labelIds.png", [[7, 8, 0, 33]] * 2)
    train, _, _ = opened(f"torch/Cityscapes:root={tmp_path}")
    assert train.num_classes == 19 and train.classes[0] == "road" and train.classes[18] == "bicycle"
    assert train.labels(0)[0].tolist() == [0, 1, IGNORED, 18]


def test_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(np.full((4, 6, 3), 50 * n, np.uint8)) for n in range(3)]
    masks = [Image.fromarray(np.full((4, 6), n % 2, np.uint8)) for n in range(3)]
    masks[0].putpixel((0, 0), 255)
    table = {"image": images, "annotation": masks, "other": masks}
    kinds = datasets.Features(dict.fromkeys(table, datasets.Image()))
    datasets.Dataset.from_dict(table, features=kinds).save_to_disk(tmp_path / "seg")
    data, _, _ = opened(f"hfds/{tmp_path / 'seg'}")
    assert len(data) == 3 and data.num_classes == 2
    assert data.labels(0)[0].tolist() == [IGNORED, 0, 0, 0, 0, 0] and (data.labels(1) == 1).all()
    assert int(data.image(1).float().mean()) == 50
    assert len(open_pairs(f"hfds/{tmp_path / 'seg'}:mask=other")) == 3
    with pytest.raises(
        UsageError, match=r"expected :mask= to name a column.*image, annotation, other"
    ):
        open_pairs(f"hfds/{tmp_path / 'seg'}:mask=none")


# Mistakes ----------------------------------------------------------------------------------------


def test_a_number_beyond_the_classes_is_named_with_its_file(tmp_path):
    root = flat_folder(tmp_path / "data", [[[0, 1], [1, 0]], [[0, 1], [7, 0]]])
    (root / "classes.txt").write_text("road\nsky\n")
    with pytest.raises(
        UsageError, match=r"annotations/1.png' holds the number 7; expected 0 to 1.*:ignore=7"
    ):
        opened(root)
    assert opened(f"{root}:ignore=7")[0].num_classes == 2
    with pytest.raises(UsageError, match="holds the number 7; expected 1 to 2, for 2 classes"):
        opened(f"{root}:reduce_zero_label=true")


def test_a_class_of_val_that_train_lacks(tmp_path, caplog):
    train = flat_folder(tmp_path / "train", [[[0, 1], [3, 0]]])
    val = flat_folder(tmp_path / "val", [[[0, 4], [1, 0]]])
    with pytest.raises(
        UsageError, match=r"0.png' holds the number 4, class 4, which the masks of '.*train' lack"
    ):
        opened(train, val)
    # Within train's numbers, it is said, and its IoU is 0.
    val = flat_folder(tmp_path / "other", [[[0, 2], [1, 0]]])
    _, _, notes = opened(train, val)
    assert len(notes) == 1 and "lacks, whose IoU can only be 0: 2; leave them out" in notes[0]
    assert notes[0] in caplog.text


def test_sizes_that_differ_name_both_files(tmp_path):
    root = flat_folder(tmp_path / "data", [[[0, 1], [1, 0]]], size=(4, 6))
    with pytest.raises(
        UsageError, match=r"0.jpg' has 6 x 4 px and its mask '.*0.png' 2 x 2.*nearest neighbor"
    ):
        opened(root)


def test_files_without_partner_or_damaged_are_counted_and_listed(tmp_path, caplog):
    root = draw_shapes(tmp_path / "data", {"train": 5, "val": 2})
    (root / "annotations/train/1.png").unlink()
    (root / "images/train/3.png").unlink()
    damaged = root / "images/train/4.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    out = tmp_path / "out"
    options = {"head": "knn", "image_size": 32, "workers": 1, "dtype": "float32"}
    with caplog.at_level(logging.WARNING):
        results = segment(SEGMENTER, f"{root}:split=train", f"{root}:split=val", out, **options)
    assert results.data["train"] | {"name": "", "fingerprint": ""} == {
        "name": "", "fingerprint": "", "images": 2, "skipped": 3,
    }  # fmt: skip
    assert "3 images or masks left out" in caplog.text and "3 images or masks" in results.notes[0]
    with (out / "skipped.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["key", "reason"]
    listed = {key.removeprefix(f"{root}/"): reason for key, reason in rows[1:]}
    assert set(listed) == {"images/train/1.png", "annotations/train/3.png", "images/train/4.png"}
    assert listed["images/train/1.png"].startswith("no mask 1.png in")
    assert listed["annotations/train/3.png"].startswith("no image 3.* in")
    assert "PNG" in listed["images/train/4.png"]


def test_mistakes_in_the_call_are_one_line(tmp_path):
    root = draw_shapes(tmp_path / "data", {"train": 1, "val": 1})
    empty = tmp_path / "empty"
    (empty / "images").mkdir(parents=True)
    for seg, message in {
        str(tmp_path / "none"): "no such folder; expected FOLDER with images/ and annotations/",
        str(empty): "it has no folder annotations/",
        str(root): "images/ has the splits train, val: name one, as .*:split=train",
        f"{root}:split=test": "has no split 'test'; expected one of train, val",
        f"{root}:splits=train": "unknown option :splits=; expected one of :split=, :ignore=",
        f"{root}:split=train:year=2012": "unknown option :year=",
        f"{root}:split=train:ignore=all": "expected :ignore= with a number from 0 to 65535",
        f"{root}:split=train:reduce_zero_label=yes": "expected :reduce_zero_label=true or false, not 'yes'",
        "torch/ADE20K:root=x": "expected torch/VOCSegmentation or torch/Cityscapes",
        f"{root}:split=train:ignore=1/2/255": "has one class only",
        f"{root}:split=train:ignore=0/1/2/255": "no pixel has a class",
    }.items():
        with pytest.raises(UsageError, match=message) as error:
            opened(seg)
        assert "\n" not in str(error.value), seg
    (empty / "annotations").mkdir()
    with pytest.raises(UsageError, match="holds no images: found nothing"):
        opened(empty)
    save(empty / "images/a.png", np.zeros((2, 2, 3)))
    save(empty / "annotations/b.png", np.zeros((2, 2)))
    with pytest.raises(UsageError, match=r"none of its 1 images has a mask.*no mask a.png in"):
        opened(empty)
    save(empty / "images/a.jpg", np.zeros((2, 2, 3)))
    with pytest.raises(UsageError, match=r"has both 'a.jpg' and 'a.png'"):
        opened(empty)


def test_data_that_cannot_be_used_at_all(tmp_path):
    root = flat_folder(tmp_path / "data", [[[0, 1], [1, 0]]])
    (root / "annotations/0.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"none of its 1 images can be used; the first, '.*0.png'"):
        opened(root)


def test_a_file_that_is_gone_later_is_named(tmp_path):
    root = flat_folder(tmp_path / "data", [[[0, 1], [1, 0]]])
    data, _, _ = opened(root)
    (root / "annotations/0.png").unlink()
    with pytest.raises(
        RunError, match=r"0.png' could be read at the start, and cannot now: No such"
    ):
        data.labels(0)


def test_too_few_file_handles_are_not_the_files_fault(tmp_path, monkeypatch):
    root = flat_folder(tmp_path / "data", [[[0, 1], [1, 0]]])

    def exhausted(self, index):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("img2vec.evaluate.segmentation_sources.Pairs.read_image", exhausted)
    with pytest.raises(
        RunError, match=r"Too many open files: use fewer --workers or raise ulimit -n"
    ):
        opened(root)
