"""Augmented images: those of timm and torchvision, whoever makes them, and never more in memory than needed."""

import random
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from img2vec.evaluate.augment import crop_and_flip, randaugment, seeded, training_steps
from img2vec.evaluate.labeled import open_labeled
from tokdiv.data.decode import decode_image
from tokdiv.errors import UsageError

MEAN, STD = (0.48, 0.46, 0.41), (0.23, 0.22, 0.22)


@pytest.fixture(scope="module")
def train(pictures):
    return open_labeled(*pictures)[0]


def recipe(size: int = 32, **changes):
    options = {"auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.25}
    return randaugment(size, mean=MEAN, std=STD, **{**options, **changes})


def images(train, augmentation, **changes):
    """Each image of the epochs, by (epoch, index)."""
    options = {"batch_size": 10, "micro_batch_size": 10, "epochs": 2, "seed": 0, "workers": 1}
    found = {}
    for step in training_steps(train, augmentation, **{**options, **changes}):
        for batch in step.batches:
            for index, image, label in zip(batch.indices.tolist(), batch.images, batch.labels):
                assert label == train.labels[index]
                found[step.epoch, index] = image.clone()
    return found


def by_timm(notation: str, reprob: float = 0.25):
    return create_transform(
        32,
        is_training=True,
        color_jitter=None,
        auto_augment=notation or None,
        interpolation="bicubic",
        re_prob=reprob,
        re_mode="pixel",
        re_count=1,
        mean=MEAN,
        std=STD,
    )


def by_torchvision():
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (crop_and_flip(32), by_torchvision()),
        (recipe(), by_timm("rand-m9-mstd0.5-inc1")),
        (recipe(auto_augment="", reprob=1.0), by_timm("", 1.0)),
        (recipe(auto_augment="original-mstd0.5"), by_timm("original-mstd0.5")),
        (recipe(auto_augment="augmix-m3-w2"), by_timm("augmix-m3-w2")),
    ],
    ids=["crop and flip", "RandAugment", "erasing", "AutoAugment", "AugMix"],
)
def test_images_are_those_of_timm_and_torchvision(train, ours, theirs):
    found = images(train, ours, epochs=1, workers=3)
    assert len(found) == 49
    for (epoch, index), image in found.items():
        pixels = decode_image(train.source.read(int(train.indices[index])))
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        with seeded(0, epoch, index):
            assert torch.equal(image, theirs(picture))


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (2, 900)])
@pytest.mark.parametrize("augmentation", [crop_and_flip(8), recipe(8)], ids=["probe", "finetune"])
def test_small_and_narrow_pictures_are_augmented_too(augmentation, size):
    picture = Image.new("RGB", size, (200, 100, 50))
    for seed in range(20):
        pixels = augmentation.apply(picture, np.random.SeedSequence(seed).generate_state(3))
        assert pixels.shape == (3, 8, 8)


@pytest.mark.parametrize("augmentation", [crop_and_flip(32), recipe()], ids=["probe", "finetune"])
def test_an_image_depends_on_seed_epoch_and_index_alone(train, augmentation):
    first = images(train, augmentation)
    assert len(first) == 2 * 50 - 2  # one is damaged
    again = images(train, augmentation, workers=4, batch_size=25, micro_batch_size=4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    resumed = images(train, augmentation, first_epoch=1)
    assert resumed
    assert all(torch.equal(first[key], image) for key, image in resumed.items())
    index = next(index for epoch, index in first if epoch == 0)
    assert not torch.equal(first[0, index], first[1, index])
    assert not torch.equal(first[0, index], images(train, augmentation, seed=1)[0, index])


def test_the_global_generators_are_left_alone_and_harmless(train):
    """The training loop may draw from them, and seed them, while images are made."""
    expected = images(train, recipe())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    images(train, recipe(), workers=3)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        found = images(train, recipe(), workers=3)
    finally:
        stop.set()
        thread.join()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_steps_come_in_forward_passes_of_bounded_memory(train):
    """Whole batches at once took 79 GB with the default recipe on ImageNet."""
    steps = training_steps(
        train,
        crop_and_flip(32),
        batch_size=50,
        micro_batch_size=8,
        epochs=2,
        seed=0,
        workers=2,
    )
    skipped = []
    for number, step in enumerate(steps):
        assert (step.epoch, step.step, step.num_steps) == (number, 0, 1)
        assert (step.num_images, step.num_batches) == (50, 7)
        sizes = []
        for batch in step.batches:
            # What a batch refers to is no larger than the batch itself.
            assert batch.images.untyped_storage().nbytes() <= 8 * 3 * 32 * 32
            sizes.append(len(batch.images) + len(batch.skipped))
            skipped += batch.skipped
        assert sizes == [8] * 6 + [2]
    assert number == 1
    assert len(skipped) == 2
    assert len(set(skipped)) == 1


def test_what_a_step_leaves_unread_is_not_given_to_the_next(train):
    steps = training_steps(
        train,
        crop_and_flip(8),
        batch_size=25,
        micro_batch_size=5,
        epochs=1,
        seed=0,
        workers=2,
    )
    order = np.random.default_rng([0, 0]).permutation(50)
    for number, step in enumerate(steps):
        batch = next(step.batches)
        expected = order[25 * number : 25 * number + 5].tolist()
        assert sorted([*batch.indices.tolist(), *batch.skipped]) == sorted(expected)


def test_no_thread_is_left_where_training_stops_early(train):
    steps = training_steps(
        train, recipe(), batch_size=10, micro_batch_size=10, epochs=5, seed=0, workers=2
    )
    next(steps)
    steps.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("tokdiv-")]


def test_every_operation_takes_every_magnitude():
    from img2vec.evaluate.augment import _Generators, timm_policy

    picture = Image.new("RGB", (40, 30), (200, 100, 50))
    operations = timm_policy("rand-m9-mstd0.5-inc1", 32, MEAN, _Generators()).ops
    for operation in operations:
        operation.prob, operation.magnitude_std = 1.0, 0
        for magnitude in range(11):
            operation.magnitude = magnitude
            assert operation(picture).size == picture.size
    posterize = next(one for one in operations if one.name.startswith("Posterize"))
    assert posterize(picture).getpixel((0, 0)) == (0, 0, 0)  # magnitude 10 keeps no bit
    posterize.magnitude = 5
    assert posterize(picture).getpixel((0, 0)) == (192, 64, 0)  # and 5 keeps two


def test_an_unknown_notation_is_named():
    for notation in ("random", "rand-q9", "unheard"):
        with pytest.raises(
            UsageError, match=f"--auto-augment {notation}: expected timm's notation"
        ):
            recipe(auto_augment=notation)


def test_seeding_puts_the_generators_back():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    with seeded(5):
        inside = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002
    with seeded(5):
        assert (random.random(), np.random.rand(), torch.rand(1)) == inside  # noqa: NPY002
