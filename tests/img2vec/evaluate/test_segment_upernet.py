"""UPerNet: strides and gradients of its pyramid, levels of any backbone, groups of parameters."""

import pytest
import torch
import torch.nn.functional as F
from shapes import SEGMENTER

from img2vec.evaluate.confusion import IGNORED
from img2vec.evaluate.encoder import load_encoder
from img2vec.evaluate.segment_finetune import (
    AUXILIARY_WEIGHT,
    learning_rate,
    pixel_loss,
    upernet_step,
)
from img2vec.evaluate.segment_settings import SegmentRecipe
from img2vec.evaluate.upernet import (
    build_upernet,
    choose_levels,
    doublings,
    rescaling,
    upernet_groups,
)
from tokdiv.dist import current_processes
from tokdiv.errors import UsageError


def built(spec=SEGMENTER, size=32, **changes):
    torch.manual_seed(0)
    options = {"blocks": None, "channels": 24, "drop_path": 0.0, **changes}
    teacher = load_encoder(spec, image_size=size, device="cpu", dtype="float32")
    return build_upernet(teacher, 5, **options), teacher


BACKBONES = {
    SEGMENTER: 32,  # a ViT of patches of 8 px
    "timm:test_vit@random": 64,  # of 16 px
    "timm:test_resnet@random": 64,
    "timm:test_convnext@random": 64,
    "timm:test_efficientnet@random": 64,
}


@pytest.mark.parametrize("spec", BACKBONES)
def test_maps_have_strides_of_4_8_16_32_and_everything_is_trained(spec):
    size = BACKBONES[spec]
    network, teacher = built(spec, size)
    weights = teacher.module.state_dict()
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(value, weights[name]), name
    images = torch.randn(2, 3, size, size)
    assert [tuple(plane.shape[2:]) for plane in network.pyramid(images)] == [
        (size // stride, size // stride) for stride in (4, 8, 16, 32)
    ]
    logits, auxiliary = network(images)
    assert logits.shape == (2, 5, size // 4, size // 4)
    assert auxiliary.shape == (2, 5, size // 16, size // 16)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert without == []  # DistributedDataParallel would stop


def test_the_rescaling_is_beits():
    names = [[type(layer).__name__ for layer in rescaling(8, n)] for n in (2, 1, 0)]
    assert names == [
        ["ConvTranspose2d", "BatchNorm2d", "GELU", "ConvTranspose2d"],
        ["ConvTranspose2d"],
        [],
    ]
    assert type(rescaling(8, -1)).__name__ == "MaxPool2d"
    assert [doublings(16, stride) for stride in (4, 8, 16, 32)] == [2, 1, 0, -1]
    assert [doublings(14, stride) for stride in (4, 8, 16, 32)] == [2, 1, 0, -1]
    assert [doublings(8, stride) for stride in (4, 8, 16, 32)] == [1, 0, -1, -2]


def test_levels_are_those_of_the_papers():
    assert choose_levels("b", [16] * 12, None) == [3, 5, 7, 11]
    assert choose_levels("l", [16] * 24, None) == [7, 11, 15, 23]
    assert choose_levels("tiny", [16] * 4, None) == [0, 1, 2, 3]
    assert choose_levels("resnet", [2, 4, 8, 16, 32], None) == [1, 2, 3, 4]
    assert choose_levels("mobilenet", [2, 4, 8, 16, 16, 32, 32], None) == [1, 2, 4, 6]
    assert choose_levels("b", [16] * 12, [2, 5, 8, 11]) == [2, 5, 8, 11]
    with pytest.raises(UsageError, match="takes four blocks of b, ascending, of 0 to 11"):
        choose_levels("b", [16] * 12, [3, 5, 12, 13])
    with pytest.raises(UsageError, match="takes four blocks"):
        choose_levels("b", [16] * 12, [3, 5])
    with pytest.raises(UsageError, match="has 3 blocks: --head upernet takes four"):
        choose_levels("b", [16] * 3, None)
    with pytest.raises(UsageError, match="has stages of strides 2, 4, 8"):
        choose_levels("cut", [2, 4, 8], None)


def test_learning_rates_fall_by_the_block_and_norms_do_not_decay():
    network, _ = built()
    groups = upernet_groups(network, weight_decay=0.05, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    seen = set()
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            if not name.startswith("backbone."):
                expected = 1.0
            elif name.startswith("backbone.blocks."):
                expected = 0.5 ** (4 - int(name.split(".")[2]))  # 0.5 for the last of four
            else:
                expected = 0.5**5
            assert group.get("lr_scale", 1.0) == pytest.approx(expected), name
            undecayed = parameter.ndim <= 1 or name in ("backbone.cls_token", "backbone.pos_embed")
            assert group["weight_decay"] == (0.0 if undecayed else 0.05), name
    assert seen == set(names.values())


def test_what_upernet_cannot_take_is_one_line():
    with pytest.raises(UsageError, match="'hog': --head upernet takes timm models"):
        built("hog", 32)
    with pytest.raises(UsageError, match="takes four"):
        built(f"{SEGMENTER}:blocks=2")


def test_the_schedule_is_mmsegmentations():
    recipe = SegmentRecipe(max_steps=100, warmup_steps=10, lr=1e-4)
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert rates[0] == pytest.approx(1e-10) and rates[5] == pytest.approx(5e-5)
    assert rates[10] == pytest.approx(1e-4) and rates[55] == pytest.approx(5e-5)
    assert rates[99] == pytest.approx(1e-4 / 90)
    assert learning_rate(0, SegmentRecipe(max_steps=1, warmup_steps=0, lr=1.0)) == 1.0


def test_a_step_adds_both_heads_over_labeled_pixels_in_any_number_of_parts(monkeypatch):
    group = current_processes()
    images = torch.randn(4, 3, 32, 32)
    labels = torch.randint(0, 5, (4, 32, 32))
    labels[0] = IGNORED
    labels[2, :20] = IGNORED
    losses, weights = [], []
    for micro in (4, 2):
        network, _ = built()
        network.eval()
        # BatchNorm by its running statistics, for which the parts do not matter.
        monkeypatch.setattr(network, "train", lambda: None)
        recipe = SegmentRecipe(micro_batch_size=micro, dtype="float32")
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        if micro == 4:
            with torch.no_grad():
                outputs = network(images)
            counted = labels != IGNORED
            expected = sum(
                weight * F.cross_entropy(
                    F.interpolate(out, size=(32, 32), mode="bilinear").permute(0, 2, 3, 1)[counted], labels[counted]
                )
                for weight, out in zip((1, AUXILIARY_WEIGHT), outputs)
            )  # fmt: skip
        losses.append(float(upernet_step(network, optimizer, images, labels, recipe, group)))
        weights.append(network.classify[1].weight.detach().clone())
    assert losses[0] == pytest.approx(float(expected), rel=1e-5)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert torch.allclose(weights[0], weights[1], atol=1e-6)
    assert AUXILIARY_WEIGHT == 0.4


def test_ignored_pixels_have_no_loss():
    logits = torch.randn(1, 3, 4, 4)
    assert pixel_loss(logits, torch.full((1, 8, 8), IGNORED)) == 0
