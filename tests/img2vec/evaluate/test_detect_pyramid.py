"""The feature pyramid and windowed attention: shapes, positions, gradients, and slow twins."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from img2vec.evaluate.detector import build_detector
from img2vec.evaluate.encoder import load_encoder
from img2vec.evaluate.pyramid import (
    SimplePyramid,
    TopDownPyramid,
    WindowedBlock,
    build_backbone,
    choose_window,
    join_windows,
    split_windows,
)
from img2vec.evaluate.settings import DetectSettings
from tokdiv.errors import UsageError

TINY = "timm:vit_tiny_patch16_224@random:depth=4:embed_dim=32:num_heads=2"
ROTARY = "timm:vit_small_patch16_dinov3@random:depth=2:embed_dim=48:num_heads=2"


def load(spec):
    return load_encoder(spec, image_size="native", device="cpu", dtype="float32")


# The simple feature pyramid ----------------------------------------------------------------------


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_strides_and_channels(stride):
    levels = SimplePyramid(64, stride, 24)([torch.randn(2, 64, 128 // stride, 128 // stride)])
    assert [tuple(level.shape) for level in levels] == [
        (2, 24, 128 // s, 128 // s) for s in (4, 8, 16, 32)
    ]


def test_gradients_reach_every_layer_from_its_own_level():
    pyramid = SimplePyramid(32, 16, 16)
    tokens = torch.randn(1, 32, 4, 4, requires_grad=True)
    for number in range(4):
        pyramid.zero_grad()
        tokens.grad = None
        pyramid([tokens])[number].square().sum().backward()
        assert tokens.grad.abs().sum() > 0
        for other, level in enumerate(pyramid.levels):
            given = [p.grad is not None and p.grad.abs().sum() > 0 for p in level.parameters()]
            assert all(given) if other == number else not any(given)


def test_the_numbers_are_those_of_a_slow_pyramid():
    pyramid = SimplePyramid(16, 16, 8).eval()
    tokens = torch.randn(1, 16, 3, 5)
    finest, _, _, coarsest = pyramid([tokens])
    # Stride 4: two deconvolutions with a norm and GELU between, then 1x1 and 3x3 convolutions with norms.
    up1, norm, _, up2, *rest = pyramid.levels[0]

    def deconvolve(x, layer):
        B, C, H, W = x.shape
        out = layer.bias.view(1, -1, 1, 1).repeat(B, 1, 2 * H, 2 * W)
        for row in range(2):
            for column in range(2):
                kernel = layer.weight[:, :, row, column]
                out[:, :, row::2, column::2] += torch.einsum("bchw,cd->bdhw", x, kernel)
        return out

    def normalize(x, layer):
        mean = x.mean(dim=1, keepdim=True)
        variance = x.var(dim=1, keepdim=True, unbiased=False)
        scaled = (x - mean) / (variance + layer.eps).sqrt()
        return scaled * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)

    x = deconvolve(F.gelu(normalize(deconvolve(tokens, up1), norm)), up2)
    x = normalize(F.conv2d(x, rest[0].weight), rest[1])
    x = normalize(F.conv2d(x, rest[2].weight, padding=1), rest[3])
    torch.testing.assert_close(finest, x, rtol=1e-4, atol=1e-5)
    assert coarsest.shape == (1, 8, 1, 2)


def test_every_level_stays_in_place():
    # A map that is moved by two cells moves each level by 32 px, away from the borders.
    pyramid = SimplePyramid(16, 16, 8).eval()
    tokens = torch.randn(1, 16, 12, 12)
    before, after = (pyramid([t]) for t in (tokens, tokens.roll(2, dims=3)))
    for stride, one, two in zip((4, 8, 16, 32), before, after):
        moved = one.roll(32 // stride, dims=3)
        inner = slice(96 // stride, -32 // stride)
        torch.testing.assert_close(moved[..., inner], two[..., inner], rtol=1e-4, atol=1e-5)


def test_the_top_down_pyramid_is_torchvisions():
    pyramid = TopDownPyramid([8, 16, 32], 12)
    maps = [torch.randn(2, c, 32 // 2**n, 32 // 2**n) for n, c in enumerate((8, 16, 32))]
    found = pyramid(maps)
    expected = pyramid.fpn({"a": maps[0], "b": maps[1], "c": maps[2]})
    for one, two in zip(found, expected.values()):
        torch.testing.assert_close(one, two)


# Backbones ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        TINY,
        TINY + ":init_values=0.1:reg_tokens=2",
        TINY + ":blocks=1",
        ROTARY,
        "timm:vit_small_patch14_reg4_dinov2@random:depth=2:embed_dim=48:num_heads=2",
        "timm:beit_base_patch16_224@random:depth=2:embed_dim=48:num_heads=2",
        "timm:resnet18@random",
        "timm:resnet18@random:blocks=3",
        "timm:mobilenetv2_100@random",
        "timm:convnext_atto@random",
    ],
    ids=lambda spec: spec[5:].replace("@random", ""),
)
def test_any_model_gives_five_maps_and_trains_every_weight(spec):
    backbone, _ = build_backbone(load(spec), 128, channels=16, drop_path=0.1)
    maps = backbone.train()(torch.randn(2, 3, 128, 128))
    assert {name: tuple(m.shape[1:]) for name, m in maps.items()} == {
        name: (16, 128 // stride, 128 // stride)
        for name, stride in zip(("0", "1", "2", "3", "pool"), (4, 8, 16, 32, 64))
    }
    sum(m.square().sum() for m in maps.values()).backward()
    # Else DistributedDataParallel would stop.
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_position_embeddings_are_resampled():
    teacher = load(TINY)
    backbone, _ = build_backbone(teacher, 320, channels=16)
    before, after = teacher.module.pos_embed, backbone.body.pos_embed
    assert after.shape == (1, 1 + 20 * 20, 32)
    assert torch.equal(before[:, :1], after[:, :1])
    grid = before[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    resampled = F.interpolate(grid, (20, 20), mode="bicubic", antialias=True)
    torch.testing.assert_close(after[:, 1:], resampled.flatten(2).transpose(1, 2))


def test_the_weights_are_the_models_with_its_layer_scale():
    teacher = load(TINY + ":init_values=1e-5")
    with torch.no_grad():
        for block in teacher.module.blocks:
            block.ls1.gamma.uniform_(0.5, 1.5)
    backbone, _ = build_backbone(teacher, 224, channels=16, drop_path=0.1)
    for name, weight in teacher.module.state_dict().items():
        assert torch.equal(weight, backbone.body.state_dict()[name]), name
    # And they are used: the last map is the teacher's.
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    seen = []
    backbone.pyramid.register_forward_hook(lambda module, inputs, output: seen.extend(inputs[0]))
    backbone.eval()((images.float() - teacher.mean) / teacher.std)
    torch.testing.assert_close(
        seen[0].flatten(2).transpose(1, 2), teacher(images), rtol=1e-4, atol=1e-5
    )


def test_a_patch_of_14_px_becomes_one_of_16():
    spec = "timm:vit_small_patch14_reg4_dinov2@random:depth=1:embed_dim=48:num_heads=2"
    backbone, notes = build_backbone(load(spec), 64, channels=16)
    assert backbone.body.patch_embed.proj.weight.shape[2:] == (16, 16)
    assert notes == ["patches are resampled from 14 to 16 px"]


def test_batchnorm_of_the_backbone_keeps_its_statistics():
    backbone, _ = build_backbone(load("timm:resnet18@random"), 64, channels=16)
    before = backbone.body.bn1.running_mean.clone()
    backbone.train()(torch.randn(2, 3, 64, 64) + 3)
    assert torch.equal(before, backbone.body.bn1.running_mean)
    assert backbone.body.training and backbone.pyramid.training


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        ("hog", 64, "is 'hog': detection trains networks of timm's"),
        ("timm:hiera_tiny_224@random", 256, "cannot take images of 256 px"),
        (
            "timm:resnet18@random:blocks=0",
            64,
            "has maps of strides 2: detection needs 4, 8, 16, 32",
        ),
    ],
)
def test_what_has_no_maps_is_refused(spec, size, message):
    with pytest.raises(UsageError, match=message):
        build_backbone(load(spec), size, channels=16)


# Windowed attention ------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "window"), [((6, 6), 3), ((4, 8), 2), ((6, 6), 6)])
def test_windows_are_cut_and_joined(grid, window):
    tokens = torch.arange(2 * grid[0] * grid[1] * 3).view(2, grid[0] * grid[1], 3)
    windows = split_windows(tokens, grid, window)
    image = tokens.unflatten(1, grid)
    number = 0
    for b in range(2):
        for row in range(0, grid[0], window):
            for column in range(0, grid[1], window):
                cut = image[b, row : row + window, column : column + window].flatten(0, 1)
                assert torch.equal(windows[number], cut)
                number += 1
    assert number == len(windows)
    assert torch.equal(join_windows(windows, grid, window), tokens)


def block_and_tokens(kind, num_prefix, grid):
    """A transformer block, tokens for it, and its rotary embedding or None."""
    torch.manual_seed(0)
    if kind == "rotary":
        network = Eva(img_size=16 * grid, patch_size=16, embed_dim=16, depth=1, num_heads=2, use_abs_pos_emb=False,
                      use_rot_pos_emb=True, num_reg_tokens=num_prefix - 1)  # fmt: skip
        rope = network.rope.get_embed()
    else:
        network = VisionTransformer(
            img_size=16 * grid, embed_dim=16, depth=1, num_heads=2, init_values=0.5
        )
        rope = None
    return network.blocks[0].eval(), torch.randn(2, num_prefix + grid * grid, 16), rope


CASES = [("plain", 0), ("plain", 1), ("plain", 5), ("rotary", 1), ("rotary", 5)]


@pytest.mark.parametrize(("kind", "num_prefix"), CASES)
def test_one_window_is_global_attention(kind, num_prefix):
    block, tokens, rope = block_and_tokens(kind, num_prefix, 6)
    options = {} if rope is None else {"rope": rope}
    windowed = WindowedBlock(block, (6, 6), 6, num_prefix)
    torch.testing.assert_close(windowed(tokens, **options), block(tokens, **options))


@pytest.mark.parametrize(("kind", "num_prefix"), CASES)
def test_windows_are_a_slow_loop(kind, num_prefix):
    grid, window = 6, 3
    block, tokens, rope = block_and_tokens(kind, num_prefix, grid)
    options = {} if rope is None else {"rope": rope}
    found = WindowedBlock(block, (grid, grid), window, num_prefix)(tokens, **options)
    numbers = torch.arange(grid * grid).view(grid, grid)
    expected = torch.zeros_like(tokens)
    for image in range(len(tokens)):
        prefixes = []
        for row in range(0, grid, window):
            for column in range(0, grid, window):
                cells = numbers[row : row + window, column : column + window].flatten()
                prefix = tokens[image : image + 1, :num_prefix]
                own = torch.cat([prefix, tokens[image : image + 1, num_prefix + cells]], dim=1)
                own_rope = {} if rope is None else {"rope": rope[cells]}
                out = block(own, **own_rope)[0]
                prefixes.append(out[:num_prefix])
                expected[image, num_prefix + cells] = out[num_prefix:]
        expected[image, :num_prefix] = torch.stack(prefixes).mean(dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [TINY, ROTARY + ":depth=4"])
def test_a_few_blocks_stay_global(spec):
    spec = spec.replace("depth=2:", "").replace(":depth=4:depth=4", ":depth=4")
    backbone, notes = build_backbone(load(spec), 128, channels=16, window="4", global_blocks=2)
    kinds = [isinstance(block, WindowedBlock) for block in backbone.body.blocks]
    assert kinds == [True, False, True, False]
    assert notes == ["attention within windows of 4 x 4 tokens, global in blocks 1, 3 of 4"]
    one_window, _ = build_backbone(load(spec), 128, channels=16, window="8", global_blocks=2)
    without, _ = build_backbone(load(spec), 128, channels=16, window="off")
    without.pyramid.load_state_dict(one_window.pyramid.state_dict())
    without.body.load_state_dict(
        {k.replace(".block.", "."): v for k, v in one_window.body.state_dict().items()}
    )
    images = torch.randn(1, 3, 128, 128)
    found, expected = one_window.eval()(images), without.eval()(images)
    torch.testing.assert_close(found["2"], expected["2"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "grid", "expected"),
    [("auto", 14, None), ("auto", 32, None), ("auto", 64, 16), ("auto", 50, 10), ("auto", 56, 14),
     ("auto", 37, None), ("off", 64, None), ("8", 64, 8), ("64", 64, 64)],
)  # fmt: skip
def test_the_window_that_is_chosen(window, grid, expected):
    assert choose_window(window, grid) == expected


@pytest.mark.parametrize("window", ["7", "0", "65", "large", "-8"])
def test_a_window_that_does_not_divide_the_grid_is_refused(window):
    with pytest.raises(
        UsageError, match=rf"--window {window}: expected auto, off, or a side .*8, 16"
    ):
        choose_window(window, 64)


# bfloat16 ----------------------------------------------------------------------------------------


def test_boxes_are_not_rounded_to_bfloat16():
    # torchvision makes anchors and boxes in the dtype of what it is given: 1023 px would become 1024.
    settings = DetectSettings(image_size=64, channels=8)
    detector, _ = build_detector(load(TINY), 2, settings)
    detector.eval()
    seen = {}
    heads = detector.roi_heads
    detector.rpn.anchor_generator.register_forward_hook(
        lambda m, i, out: seen.update(anchors=out[0])
    )
    detector.rpn.register_forward_hook(lambda m, i, out: seen.update(proposals=out[0][0]))
    heads.box_predictor.register_forward_hook(
        lambda m, i, out: seen.update(scores=out[0], deltas=out[1])
    )
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        detector([torch.rand(3, 50, 60)])
    assert {name: value.dtype for name, value in seen.items()} == dict.fromkeys(seen, torch.float32)
    assert set(seen) == {"anchors", "proposals", "scores", "deltas"}
