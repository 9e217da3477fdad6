"""Teachers against timm's own forward passes: which tokens they give, frozen, of which view."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tokdiv import Teacher, TeacherSpec, load_teacher, parse_specs
from tokdiv.errors import UsageError
from tokdiv.teachers.load import complete, load_teachers, teacher_from_file

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIT = "timm:test_vit@random:size=64"


def normalized(images: Tensor, mean=MEAN, std=STD) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    return (images / 255 - mean) / std


def network(architecture: str, **arguments: Any) -> nn.Module:
    """With weights and statistics drawn anew, so that every tensor matters."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = timm.create_model(architecture, num_classes=0, **arguments)
    generator = torch.Generator().manual_seed(1)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.add_(noise.abs() if key.endswith("running_var") else noise, alpha=0.05)
    return model.eval()


def load(model: nn.Module, folder: Path, architecture: str, **fields: Any) -> Teacher:
    """The same weights through a file, as a Teacher."""
    path = folder / "weights.pth"
    torch.save(model.state_dict(), path)
    fields = {"mean": MEAN, "std": STD, "size": 64} | fields
    dtype = fields.pop("dtype", "float32")
    return load_teacher(TeacherSpec("t", architecture, weights=str(path), **fields), dtype=dtype)


def mistake(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Tokens of the last block, by each family's own forward pass


def vit_tokens(model: nn.Module, x: Tensor) -> Tensor:
    return model.forward_features(x)[:, model.num_prefix_tokens :]


def map_tokens(model: nn.Module, x: Tensor) -> Tensor:
    return model.forward_features(x).flatten(2).transpose(1, 2)


def resnet_tokens(model: nn.Module, x: Tensor) -> Tensor:
    x = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    x = model.layer4(model.layer3(model.layer2(model.layer1(x))))
    assert (x >= 0).all()  # behind its ReLU
    return x.flatten(2).transpose(1, 2)


def mobilenet_tokens(model: nn.Module, x: Tensor) -> Tensor:
    return model.blocks(model.bn1(model.conv_stem(x))).flatten(2).transpose(1, 2)


def swin_tokens(model: nn.Module, x: Tensor) -> Tensor:
    return model.forward_features(x).flatten(1, 2)  # (B, H, W, C)


def hiera_tokens(model: nn.Module, x: Tensor) -> Tensor:
    return (
        model.forward_intermediates(x, indices=1, intermediates_only=True)[0]
        .flatten(2)
        .transpose(1, 2)
    )


TRANSFORMERS = ("vit", "deit", "swin", "hiera")  # what takes img_size
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
FAMILIES: dict[str, tuple[str, dict[str, Any], int, bool, Callable[..., Tensor]]] = {
    "vit": ("test_vit", {}, 64, True, vit_tokens),
    "vit with a norm behind its pooling": ("test_vit4", {}, 64, False, vit_tokens),
    "deit": ("deit_tiny_distilled_patch16_224", SMALL, 64, True, vit_tokens),
    "dinov2": ("vit_small_patch14_dinov2", SMALL, 56, True, vit_tokens),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", SMALL, 56, True, vit_tokens),
    "dinov3": ("vit_small_patch16_dinov3", SMALL, 64, True, vit_tokens),
    "clip": ("vit_base_patch16_clip_224", SMALL, 64, True, vit_tokens),
    "resnet": ("test_resnet", {}, 64, False, resnet_tokens),
    "convnext": ("test_convnext", {}, 64, False, map_tokens),
    "convnextv2": ("convnextv2_atto", {"depths": [1, 1, 1, 1]}, 64, False, map_tokens),
    "mobilenetv2": ("mobilenetv2_035", {"pad_type": "same"}, 64, False, mobilenet_tokens),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": [1, 1, 1, 1], "embed_dim": 24},
        64,
        True,
        swin_tokens,
    ),
    "hiera": (
        "hiera_tiny_224",
        {"stages": [1, 1, 1, 1], "embed_dim": 24},
        64,
        False,
        hiera_tokens,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_timm_s_last_block(family: str, images: Tensor, tmp_path: Path):
    architecture, arguments, size, norm, tokens_of = FAMILIES[family]
    sized = {"img_size": size} if any(n in architecture for n in TRANSFORMERS) else {}
    model = network(architecture, **sized, **arguments)
    views = images[..., :size, :size]
    with torch.no_grad():
        expected = tokens_of(model, normalized(views))
    teacher = load(model, tmp_path, architecture, arguments=arguments, size=size)
    tokens = teacher(views)
    torch.testing.assert_close(tokens, expected, rtol=1e-3, atol=1e-4)
    assert tokens.shape == (3, teacher.num_tokens, teacher.dim)
    assert teacher.grid[0] * teacher.grid[1] == teacher.num_tokens
    assert teacher.spec.norm is norm
    assert (teacher.spec.num_tokens, teacher.spec.dim) == (teacher.num_tokens, teacher.dim)


def test_tokens_are_row_major_over_the_grid():
    """A ViT whose first block sees a bright patch puts the change into that patch's token."""
    teacher = load_teacher("timm:test_vit@random:size=64:blocks=0")
    black = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    lit = black.clone()
    lit[..., 16:32, 48:64] = 255  # row 1, column 3
    change = (teacher(lit) - teacher(black)).norm(dim=2)[0]
    assert teacher.grid == (4, 4)
    assert change.argmax() == 1 * 4 + 3


# Blocks and norms


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet", "test_convnext"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_block_s_output_is_that_of_timm_s_index(
    architecture: str, block: int, images: Tensor, tmp_path: Path
):
    model = network(architecture, **({"img_size": 64} if "vit" in architecture else {}))
    with torch.no_grad():
        expected = model.forward_intermediates(
            normalized(images), indices=[block], intermediates_only=True, output_fmt="NCHW"
        )[0]
    teacher = load(model, tmp_path, architecture, block=block)
    assert teacher.grid == expected.shape[2:]
    torch.testing.assert_close(
        teacher(images), expected.flatten(2).transpose(1, 2), rtol=1e-3, atol=1e-4
    )
    assert teacher.spec.norm is False


def test_a_resnet_s_block_zero_is_its_stem(images: Tensor, tmp_path: Path):
    model = network("test_resnet")
    with torch.no_grad():
        stem = model.act1(model.bn1(model.conv1(normalized(images))))
    tokens = load(model, tmp_path, "test_resnet", block=0)(images)
    torch.testing.assert_close(tokens, stem.flatten(2).transpose(1, 2), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "block", "behind"),
    [
        ("test_vit", 1, "blocks.2."),
        ("test_resnet", 3, "layer4."),
        ("test_convnext", 1, "stages.2."),
    ],
)
def test_what_lies_behind_the_block_may_be_missing_and_is_not_run(
    architecture: str, block: int, behind: str, images: Tensor, tmp_path: Path
):
    model = network(architecture, **({"img_size": 64} if "vit" in architecture else {}))
    teacher = load(model, tmp_path, architecture, block=block)
    expected = teacher(images)
    assert not any(key.startswith(behind) for key in teacher.module.state_dict())
    cut = {k: v for k, v in model.state_dict().items() if not k.startswith(behind)}
    assert len(cut) < len(model.state_dict())
    path = tmp_path / "cut.pth"
    torch.save(cut, path)
    spec = TeacherSpec("t", architecture, str(path), size=64, mean=MEAN, std=STD, block=block)
    assert torch.equal(load_teacher(spec)(images), expected)
    assert "missing" in mistake(load_teacher, dataclasses.replace(spec, block=None))


def test_the_final_norm_is_applied_where_asked_for(images: Tensor, tmp_path: Path):
    model = network("test_vit", img_size=64)

    def tokens(**fields: Any) -> Tensor:
        return load(model, tmp_path, "test_vit", **fields)(images)

    last = len(model.blocks) - 1
    bare = tokens(norm=False)
    with torch.no_grad():
        torch.testing.assert_close(tokens(), model.norm(bare), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            tokens(block=1, norm=True), model.norm(tokens(block=1)), rtol=1e-4, atol=1e-4
        )
    assert torch.equal(tokens(norm=True), tokens())
    assert torch.equal(tokens(block=last), bare)


def test_a_norm_that_is_not_there_cannot_be_asked_for():
    said = mistake(load_teacher, "timm:test_resnet@random:size=64:norm=true")
    assert said.endswith("norm=true, but test_resnet has no final norm for its tokens")


def test_a_block_that_is_not_there_is_told_which_are():
    said = mistake(load_teacher, "timm:test_resnet@random:size=64:blocks=5")
    assert "blocks=5: test_resnet has blocks 0 to 4" in said


def test_all_blocks_at_once_are_the_blocks_one_by_one(images: Tensor, tmp_path: Path):
    model = network("test_vit", img_size=64)
    every = load(model, tmp_path, "test_vit").blocks(images)
    assert len(every) == len(model.blocks)
    for block, tokens in enumerate(every):
        alone = load(model, tmp_path, "test_vit", block=block)(images)
        torch.testing.assert_close(tokens, alone, rtol=1e-4, atol=1e-4)


# Frozen


def test_a_teacher_is_frozen_and_stays_in_eval_mode(images: Tensor):
    teacher = load_teacher("timm:test_resnet@random:size=64")
    before = copy.deepcopy(teacher.state_dict())
    holder = nn.Sequential(teacher, nn.Linear(2, 2)).train()
    assert holder.training and not any(module.training for module in teacher.modules())
    tokens = teacher(images)
    assert not tokens.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key  # BatchNorm's statistics too


def test_a_user_s_module_is_frozen_as_well(images: Tensor):
    module = nn.Sequential(nn.Conv2d(3, 4, 16, stride=16), nn.Dropout(0.5), nn.BatchNorm2d(4))
    teacher = Teacher(module.train(), size=64)
    assert torch.equal(teacher(images), teacher(images))
    assert not any(p.requires_grad for p in module.parameters())


def test_the_input_is_uint8_and_is_left_as_it_was(images: Tensor):
    teacher = load_teacher(VIT)
    before = images.clone()
    teacher(images)
    assert torch.equal(images, before)
    for wrong in (images.float(), images[0], images[:, :1]):
        with pytest.raises(TypeError, match=r"takes uint8 images of shape \(B, 3, H, W\), got"):
            teacher(wrong)


def test_an_image_s_tokens_do_not_depend_on_its_batch(images: Tensor):
    teacher = load_teacher("timm:test_resnet@random:size=64")
    torch.testing.assert_close(teacher(images)[1:2], teacher(images[1:2]), rtol=1e-4, atol=1e-5)


# Mean and std


def test_local_and_random_weights_take_the_default_configuration_s_mean_and_std(tmp_path: Path):
    for architecture in ("vit_base_patch16_clip_224", "mobilenetv2_100", "vit_tiny_patch16_224"):
        published = timm.get_pretrained_cfg(architecture)
        for weights in ("random", str(tmp_path / "w.pth")):
            spec = complete(TeacherSpec("t", architecture, weights))
            assert spec.mean == tuple(published.mean) and spec.std == tuple(published.std)
            assert spec.input_size == published.input_size[1]
    assert complete(TeacherSpec("t", "vit_base_patch16_clip_224", "random")).mean != MEAN


def test_a_tag_has_its_own_mean_and_its_weights_on_the_hub():
    tagged = complete(parse_specs(["timm:vit_base_patch16_224.dino"])[0])
    assert tagged.weights == "hf-hub:timm/vit_base_patch16_224.dino"
    assert (tagged.mean, tagged.license) == (MEAN, "apache-2.0")
    default = complete(parse_specs(["timm:vit_base_patch16_224"])[0])
    assert default.mean == (0.5, 0.5, 0.5)
    assert default.weights == (
        "hf-hub:" + timm.get_pretrained_cfg("vit_base_patch16_224").hf_hub_id
    )


def test_the_spec_s_own_mean_and_std_go_before(images: Tensor, tmp_path: Path):
    model = network("test_resnet")
    teacher = load(model, tmp_path, "test_resnet", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    with torch.no_grad():
        expected = resnet_tokens(model, normalized(images, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    torch.testing.assert_close(teacher(images), expected, rtol=1e-3, atol=1e-4)


def test_pixels_from_a_toml_file_have_a_mean(tmp_path: Path):
    path = tmp_path / "t.toml"
    path.write_text('[[teachers]]\nname = "raw"\narchitecture = "pixels"\nsize = 64\n')
    assert load_teacher(str(path)).spec.mean == MEAN


# The view


def test_the_size_is_the_spec_s_else_the_run_s_else_224():
    def size(text: str, **options: Any) -> int:
        return load_teacher(text, **options).size

    bare = VIT.removesuffix(":size=64")
    assert size(bare) == 224
    assert size(bare, image_size=96) == 96
    assert size(VIT, image_size=96) == 64
    assert size(bare, image_size="native") == timm.get_pretrained_cfg("test_vit").input_size[1]
    assert size("pixels", image_size="native") == 224


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("timm:test_vit@random:size=65", "65 px is not a multiple of its patch of 16 px"),
        ("timm:xcit_nano_12_p16_224@random:size=65", "cannot make xcit_nano_12_p16_224 for 65 px"),
        ("pixels:size=65", "65 px is not a multiple of its patch of 16 px"),
        ("timm:mobilenetv2_035@random:size=64:color=3", "does not take these arguments"),
        ("timm:test_vit@random:size=64:color=3", "does not take these arguments"),
        ("timm:test_vit@random:size=64:num_heads=7", "cannot make test_vit for 64 px"),
        ("timm:test_vit@random:size=64:depth=0", "test_vit with {'depth': 0} has no blocks"),
        ("timm:test_vit@random:size=64:patch_size=0", "cannot make test_vit for 64 px"),
        ("timm:test_vit@random:size=64:in_chans=1", "cannot take images of 64 px"),
        ("timm:test_vit@random:size=1000000", "expected a whole number from 1 to 8192"),
        ("timm:test_vit@random:seed=" + "9" * 30, "expected a whole number from 0 to "),
        ("timm:test_vitt@random", "timm has no model 'test_vitt' (did you mean test_vit"),
        (
            "timm:vit_base_patch16_224.dinoo",
            "timm has no model 'vit_base_patch16_224.dinoo' (did you mean vit_base_patch16_224.dino",
        ),
    ],
)
def test_what_an_architecture_cannot_do_is_said(text: str, said: str):
    assert said in mistake(load_teacher, text)


def test_a_deprecated_name_of_timm_is_today_s(tmp_path: Path):
    published = complete(parse_specs(["timm:vit_base_patch16_224_dino"])[0])
    assert published.architecture == "vit_base_patch16_224.dino"
    assert published.weights == "hf-hub:timm/vit_base_patch16_224.dino"
    assert complete(TeacherSpec("t", "vit_base_patch16_224_dino", "random")).mean == MEAN


def test_weights_that_another_activation_was_trained_with_are_remarked_on(
    caplog: pytest.LogCaptureFixture,
):
    complete(parse_specs(["timm:vit_base_patch16_clip_224.openai"])[0])
    (message,) = caplog.messages
    assert "natively QuickGELU" in message
    assert message.endswith("write timm:vit_base_patch16_clip_quickgelu_224.openai")
    caplog.clear()
    for text in (
        "timm:vit_base_patch16_clip_quickgelu_224.openai",
        "timm:vit_base_patch16_clip_224.laion2b",
        "clip_vit_base",
    ):
        complete(parse_specs([text])[0])
    assert not caplog.messages


def test_an_architecture_without_weights_is_told_which_have_some():
    bare = next(n for n in timm.list_models("vit_*") if not timm.list_pretrained(n + ".*"))
    said = mistake(load_teacher, f"timm:{bare}")
    assert "has no weights for" in said and said.endswith("write @PATH or @random")


def test_an_architecture_whose_patch_is_a_number_loads():
    assert load_teacher("timm:xcit_nano_12_p16_224@random:size=64").grid == (4, 4)


def test_mean_and_std_of_an_own_network_are_checked_like_any(images: Tensor):
    conv = nn.Conv2d(3, 8, 16, stride=16)
    assert Teacher(conv, size=64, mean=0.5, std=[0.1, 0.2, 0.3]).spec.std == (0.1, 0.2, 0.3)
    assert "expected positive numbers" in mistake(Teacher, conv, size=64, std=0.0)


def test_a_group_is_no_single_teacher():
    assert "'paper' names 4 teachers: load them one at a time" in mistake(load_teacher, "paper")


def test_an_unknown_dtype_is_a_mistake():
    said = mistake(load_teacher, VIT, dtype="float16")
    assert said == "dtype 'float16': expected one of float32, bfloat16"


# Untrained weights


def test_random_weights_are_the_same_each_time_and_differ_by_seed(images: Tensor):
    first, again = load_teacher(VIT)(images), load_teacher(VIT)(images)
    assert torch.equal(first, again)
    assert not torch.allclose(first, load_teacher(VIT + ":seed=1")(images), atol=1e-2)


def test_loading_leaves_the_global_generators_untouched():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    load_teacher(VIT), load_teacher("timm:test_resnet@random:size=64")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_weights_do_not_depend_on_what_was_drawn_before(images: Tensor):
    torch.manual_seed(1)
    first = load_teacher(VIT)(images)
    torch.manual_seed(2)
    assert torch.equal(load_teacher(VIT)(images), first)


def test_random_teachers_are_baselines_and_load_again_from_their_record(images: Tensor):
    teacher = load_teacher(VIT + ":seed=3")
    assert teacher.spec.baseline
    again = load_teacher(TeacherSpec.from_dict(teacher.spec.to_dict()))
    assert torch.equal(again(images), teacher(images))
    assert again.spec == teacher.spec


# bfloat16: the weights are cast once, and the numbers are those of plain autocast


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("test_vit", {}),
        ("test_resnet", {}),
        ("test_convnext", {}),
        ("test_nfnet", {}),  # standardizes its weights before it uses them
        ("vit_small_patch16_dinov3", SMALL),
        ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1], "embed_dim": 24}),
    ],
)
def test_bfloat16_is_plain_autocast_bit_for_bit(
    architecture: str, arguments: dict[str, Any], images: Tensor
):
    spec = TeacherSpec("t", architecture, "random", size=64, arguments=arguments)
    exact = load_teacher(spec)
    plain = copy.deepcopy(exact.module)
    options = {"norm": True} if exact.spec.norm else {}
    x = images.float().sub_(exact.mean).div_(exact.std)  # the same rounding as the teacher's
    if exact.channels_last:
        x = x.to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = plain.forward_intermediates(
            x, indices=1, output_fmt="NCHW", intermediates_only=True, **options
        )[0]
    teacher = load_teacher(spec, dtype="bfloat16")
    tokens = teacher(images)
    assert torch.equal(tokens, expected.flatten(2).transpose(1, 2))
    assert teacher.dtype == torch.bfloat16
    difference = (tokens.float() - exact(images)).norm() / exact(images).norm()
    assert 0 < difference < 0.1


def test_a_mobile_convnet_stays_in_float32(images: Tensor):
    text = "timm:mobilenetv2_035@random:size=64:pad_type=same"
    exact, teacher = load_teacher(text), load_teacher(text, dtype="bfloat16")
    assert teacher.dtype == torch.float32
    assert torch.equal(teacher(images), exact(images))
    teacher.prepare("cpu", "float32")


def test_a_rounded_teacher_cannot_pretend_to_be_exact():
    teacher = load_teacher(VIT, dtype="bfloat16")
    assert "was loaded with dtype bfloat16" in mistake(teacher.prepare, "cpu", "float32")
    teacher.prepare("cpu", "bfloat16")


def test_a_user_s_module_keeps_its_weights_under_bfloat16(images: Tensor):
    module = nn.Conv2d(3, 8, 16, stride=16)
    weight = module.weight.clone()
    teacher = Teacher(module, size=64).prepare("cpu", "bfloat16")
    assert teacher(images).dtype == torch.bfloat16
    assert torch.equal(module.weight, weight)
    assert teacher.prepare("cpu", "float32")(images).dtype == torch.float32


# The user's own networks


class Patches(nn.Module):
    """An encoder with a CLS token, as people bring them."""

    def __init__(self, grid: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 64 // grid, stride=64 // grid)

    def features(self, images: Tensor) -> Tensor:
        return self.conv(images)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        return {"tokens": torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)}


class Raises(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        raise KeyError("no such key")


class Nothing(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images[:, :0]


def test_tokens_may_be_a_feature_map_or_tokens(images: Tensor):
    conv = nn.Conv2d(3, 8, 16, stride=16)
    as_map = Teacher(conv, size=64)
    as_tokens = Teacher(nn.Sequential(conv, nn.Flatten(2)), lambda out: out.mT, size=64)
    assert as_map.grid == as_tokens.grid == (4, 4)
    assert torch.equal(as_map(images), as_tokens(images))


def test_the_three_forms_of_a_token_function_agree(images: Tensor):
    module = Patches()
    of_output = Teacher(module, lambda output: output["tokens"][:, 1:], size=64)
    of_both = Teacher(module, lambda net, x: net(x)["tokens"][:, 1:], size=64)
    of_method = Teacher(module, module.features, size=64)
    expected = module.conv(normalized(images)).flatten(2).transpose(1, 2)
    for teacher in (of_output, of_both, of_method):
        assert (teacher.grid, teacher.num_tokens, teacher.dim) == ((4, 4), 16, 8)
        torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-5)


def test_a_token_function_may_have_options_of_its_own(images: Tensor):
    def tokens(output: dict[str, Tensor], skip: int = 1) -> Tensor:
        return output["tokens"][:, skip:]

    assert Teacher(Patches(), tokens, size=64).num_tokens == 16


def test_a_cls_token_is_not_counted_and_other_shapes_may_say_their_grid(images: Tensor):
    def with_cls(output: dict[str, Tensor]) -> Tensor:
        return output["tokens"]

    said = mistake(Teacher, Patches(), with_cls, size=112, name="mine")
    assert said.startswith("mine gives 50 tokens, a square and one more: leave the CLS token out")
    assert Teacher(Patches(), with_cls, size=64).grid == (1, 17)
    wide = Teacher(nn.Conv2d(3, 8, (16, 8), stride=(16, 8)), size=64)
    assert (wide.grid, wide.num_tokens) == ((4, 8), 32)
    given = Teacher(wide.module, lambda out: out.flatten(2).mT, size=64, grid=(4, 8))
    assert given.grid == (4, 8)
    assert torch.equal(given(images), wide(images))
    said = mistake(Teacher, wide.module, lambda out: out.argmax(1, keepdim=True), size=64)
    assert said == "custom returned tokens of torch.int64: expected floating point"
    said = mistake(Teacher, wide.module, lambda out: out.flatten(2).mT, size=64, grid=(4, 7))
    assert said.endswith("gives 32 tokens, which are not a grid of 4 x 7")


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Patches(), "returned dict for one image: expected a feature map (1, C, H, W) or tokens"),
        (nn.Flatten(), "returned shape (1, 12288) for one image"),
        (nn.Linear(3, 3), "cannot take images of 64 px"),
        (Raises(), "mine cannot take images of 64 px: 'no such key'"),
        (Nothing(), "returned shape (1, 0, 64, 64) for one image"),
        (nn.Conv2d(3, 8, 16, stride=16, device="meta"), "mine has no weights (meta device)"),
    ],
)
def test_a_module_that_gives_no_tokens_is_told_what_to_do(module: nn.Module, said: str):
    assert said in mistake(Teacher, module, size=64, name="mine")


def test_a_user_s_teacher_says_that_it_cannot_be_loaded_again():
    teacher = Teacher(nn.Conv2d(3, 8, 16, stride=16), size=64, name="mine", mean=(0.5,) * 3)
    assert (teacher.spec.architecture, teacher.spec.name) == ("custom", "mine")
    assert (teacher.spec.mean, teacher.spec.size, teacher.spec.dim) == ((0.5,) * 3, 64, 8)
    assert teacher.spec.parameters == 3 * 8 * 256 + 8
    again = TeacherSpec.from_dict(teacher.spec.to_dict())
    assert "a spec alone cannot load it again" in mistake(load_teacher, again)
    said = mistake(teacher.blocks, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert "the blocks of a module of your own are unknown" in said


def test_own_and_named_teachers_load_together_under_unique_labels():
    mine = Teacher(nn.Conv2d(3, 8, 16, stride=16), size=64, name="mine")
    loaded = load_teachers([mine, "a=pixels,b=hog", VIT], image_size=64)
    assert loaded[0] is mine
    assert [t.name for t in loaded] == ["mine", "a", "b", VIT]
    assert "the label 'mine' names 2 teachers" in mistake(load_teachers, [mine, "mine=pixels"])
    assert "no teacher given" in mistake(load_teachers, [])


# --teacher-module FILE.py:FUNCTION

OWN = """
from __future__ import annotations
from dataclasses import dataclass
import torch
import tokdiv

@dataclass
class Options:
    width: int = 8

def make():
    conv = torch.nn.Conv2d(3, Options().width, 16, stride=16)
    return tokdiv.Teacher(conv, size=64, name="mine")

def network():
    return torch.nn.Conv2d(3, 8, 16, stride=16)

def fails():
    raise KeyError("no such\\nweights")

constant = 3
"""


def test_a_file_s_function_makes_a_teacher(tmp_path: Path, images: Tensor):
    path = tmp_path / "torch.py"  # its name must not stand in the way of its imports
    path.write_text(OWN)
    teacher = teacher_from_file(f"{path}:make")
    assert (teacher.name, teacher.dim) == ("mine", 8)
    assert teacher(images).shape == (3, 16, 8)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("own.py", "expected FILE.py:FUNCTION, with a file that exists"),
        ("gone.py:make", "expected FILE.py:FUNCTION, with a file that exists"),
        ("own.py:", "expected FILE.py:FUNCTION"),
        ("own.py:not-a-name", "expected FILE.py:FUNCTION"),
        ("own.py:mak", "'own.py' has no function 'mak'"),
        ("own.py:constant", "'own.py' has no function 'constant'"),
        ("own.txt:make", "'own.txt' is no Python file"),
        ("own.py:network", "returned Conv2d, not a tokdiv.Teacher"),
        ("own.py:fails", "raised KeyError: 'no such"),
        ("broken.py:make", "raised SyntaxError:"),
        ("leaves.py:make", "raised SystemExit: 3"),
    ],
)
def test_a_mistake_with_a_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, said: str
):
    monkeypatch.chdir(tmp_path)
    for name in ("own.py", "own.txt"):
        Path(name).write_text(OWN)
    Path("broken.py").write_text("def make(:\n")
    Path("leaves.py").write_text("import sys\n\nsys.exit(3)\n")
    message = mistake(teacher_from_file, reference)
    assert message.startswith(f"--teacher-module {reference}") and said in message


# Real weights


def real(folder: Path, text: str) -> str:
    return text.replace("@", f"@{folder}/weights/")


def test_real_weights_without_the_last_stage_load_cut_at_the_third(data_folder: Path):
    text = real(data_folder, "timm:resnet18@resnet18_in1k_layers1-3_bnfolded.safetensors")
    teacher = load_teacher(text + ":blocks=3")
    assert (teacher.grid, teacher.dim) == ((14, 14), 256)
    said = mistake(load_teacher, text)
    assert "missing layer4.0.conv1.weight, " in said and "unexpected" not in said


def test_real_half_precision_weights_load_strictly(data_folder: Path):
    vit = "timm:vit_tiny_patch16_224@vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    teacher = load_teacher(real(data_folder, vit))
    assert (teacher.grid, teacher.dim, teacher.spec.mean) == ((14, 14), 192, (0.5, 0.5, 0.5))
    assert {p.dtype for p in teacher.module.parameters()} == {torch.float32}
    bird = "timm:mobilenetv2_100@mobilenetv2_100.coral_qat_inat_bird.safetensors:pad_type=same"
    teacher = load_teacher(real(data_folder, bird))
    assert (teacher.grid, teacher.dim) == ((7, 7), 320)
