import math

import numpy as np
import pytest
import torch
from small import SMALL, make_model, make_small_training, make_teacher

from img2vec.attention import last_tokens
from img2vec.config import make_config
from img2vec.data import Batch
from img2vec.masking import draw_mask
from img2vec.model import (
    choose_attention,
    make_student,
    resolve_blocks,
    sine_positions,
)
from img2vec.step import image_losses
from tokdiv.errors import UsageError


def _batch(model, num_images: int, size: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (num_images, 3, size, size), generator=generator)
    masks = np.stack([draw_mask(model.layout, 0, 0, p) for p in range(num_images)])
    return Batch(
        np.arange(num_images),
        images.to(torch.uint8),
        torch.from_numpy(masks),
        torch.ones(num_images),
    )


# The oracle: one token at a time, in float64, from the parameters by name ------------------------


def _linear(x, p, name):
    return p[f"{name}.weight"] @ x + p[f"{name}.bias"]


def _norm(x, weight=None, bias=None):
    x = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-6)
    return x if weight is None else x * weight + bias


def _slow_block(tokens, p, name, heads):
    normed = [_norm(t, p[f"{name}.norm1.weight"], p[f"{name}.norm1.bias"]) for t in tokens]
    qkv = [_linear(t, p, f"{name}.attn.qkv") for t in normed]
    dim = len(tokens[0])
    width = dim // heads
    after = []
    for i in range(len(tokens)):
        parts = []
        for h in range(heads):
            at = slice(h * width, (h + 1) * width)
            query = qkv[i][:dim][at]
            scores = torch.stack(
                [(query * other[dim : 2 * dim][at]).sum() / math.sqrt(width) for other in qkv]
            )
            weights = torch.exp(scores) / torch.exp(scores).sum()
            parts.append(sum(w * other[2 * dim :][at] for w, other in zip(weights, qkv)))
        after.append(tokens[i] + _linear(torch.cat(parts), p, f"{name}.attn.proj"))
    result = []
    for t in after:
        hidden = _linear(
            _norm(t, p[f"{name}.norm2.weight"], p[f"{name}.norm2.bias"]), p, f"{name}.mlp.fc1"
        )
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        result.append(t + _linear(hidden, p, f"{name}.mlp.fc2"))
    return result


def _smooth_l1(a, b):
    errors = [e * e / 4 if abs(e) < 2 else abs(e) - 1 for e in a - b]
    return sum(errors) / len(errors)


def _slow_loss(p, images, masks, teacher_tokens, geometry, blocks, config):
    """The whole loss of a batch; geometry: patches, units and teacher tokens along a side, patch in px."""
    side, units, coarse, patch = geometry
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (config.mean, config.std))
    dim = p["encoder.cls_token"].shape[-1]
    decoder_heads = config.decoder_dim // 32
    total = 0.0
    for image, mask, raw in zip(images, masks, teacher_tokens):
        targets = [_norm(t) for t in raw]
        hidden = [
            bool(mask[(n // side) * units // side * units + (n % side) * units // side])
            for n in range(side * side)
        ]
        tokens = [p["encoder.cls_token"][0, 0] + p["encoder.pos_embed"][0, 0]]
        visible = [n for n in range(side * side) if not hidden[n]]
        for n in visible:
            row, column = n // side * patch, n % side * patch
            pixels = image[:, row : row + patch, column : column + patch].double() / 255
            pixels = (pixels - mean[:, None, None]) / std[:, None, None]
            weight = p["encoder.patch_embed.proj.weight"]
            embedded = (weight * pixels).sum(dim=(1, 2, 3)) + p["encoder.patch_embed.proj.bias"]
            tokens.append(embedded + p["encoder.pos_embed"][0, 1 + n])
        outputs = []
        for number in range(max(blocks) + 1):
            tokens = _slow_block(tokens, p, f"encoder.blocks.{number}", heads=dim // 32)
            if number in blocks:
                outputs.append([_norm(t) for t in tokens])
        represented = [sum(o[i] for o in outputs) / len(outputs) for i in range(len(tokens))]

        positions = sine_positions((side, side), config.decoder_dim).double()
        places = {n: i + 1 for i, n in enumerate(visible)}
        sequence = [_linear(represented[0], p, "decoder_embed")]
        for n in range(side * side):
            if hidden[n]:
                sequence.append(p["mask_token"][0, 0] + positions[n])
            else:
                sequence.append(_linear(represented[places[n]], p, "decoder_embed") + positions[n])
        for number in range(config.decoder_depth):
            sequence = _slow_block(sequence, p, f"decoder_blocks.{number}", decoder_heads)
        predictions = [
            _linear(_norm(t, p["decoder_norm.weight"], p["decoder_norm.bias"]), p, "head")
            for t in sequence[1:]
        ]
        step = side // coarse
        losses = []
        for t in range(coarse * coarse):
            cells = [
                (t // coarse * step + i) * side + t % coarse * step + j
                for i in range(step)
                for j in range(step)
            ]
            if hidden[cells[0]]:
                losses.append(
                    _smooth_l1(sum(predictions[c] for c in cells) / len(cells), targets[t])
                )
        total = total + sum(losses) / len(losses)

        average = sum(represented[1:]) / len(visible)
        inner = torch.clamp(_linear(average, p, "global_head.0"), min=0)
        image_prediction = _linear(inner, p, "global_head.2")
        total = total + config.global_weight * _smooth_l1(
            image_prediction, sum(targets) / len(targets)
        )
    return total / len(images)


@pytest.mark.parametrize(
    ("stride", "options"),
    [
        (16, {}),
        (16, {"student_args": {"depth": 2, "patch_size": 8}, "image_size": 32, "mask_ratio": 0.5}),
        (16, {"blocks": "0", "global_weight": 0.25}),
    ],
    ids=["equal grids", "pooled student", "first block"],
)
def test_loss_and_gradients_are_those_of_a_slow_independent_walk(stride, options):
    size = options.get("image_size", 64)
    teacher = make_teacher(stride, size)
    model = make_model(teacher.grid, teacher.dim, **options).double()
    teacher.double()
    batch = _batch(model, 2, size)
    config = make_config(options=SMALL | options)
    # Far from the initial values, where biases are 0 and norms are 1.
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * 0.2)
    # Teacher.forward takes float32 pixels: the oracle is given its tokens, and so is the model.
    tokens = torch.randn(2, teacher.num_tokens, teacher.dim, generator=generator).double()
    teacher.forward = lambda images: tokens
    patch, image, _ = image_losses(make_small_training(model, teacher, **options), batch)
    loss = (patch + config.global_weight * image).mean()
    loss.backward()

    slow = {
        k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in model.named_parameters()
    }
    side = model.layout.patches[0]
    geometry = (side, model.layout.units[0], teacher.grid[0], size // side)
    expected = _slow_loss(slow, batch.images, batch.masks, tokens, geometry, model.blocks, config)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, slow[name].grad, atol=1e-6, rtol=1e-6)
            compared += 1
    assert compared > 20


def test_hidden_pixels_reach_the_teacher_and_never_the_encoder():
    model, teacher = make_model().eval(), make_teacher()
    batch = _batch(model, 3)
    training = make_small_training(model, teacher)
    _, _, before = image_losses(training, batch)
    targets = teacher(batch.images)
    hidden = batch.masks.reshape(3, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    changed = torch.where(hidden, 255 - batch.images, batch.images)
    moved = Batch(batch.positions, changed, batch.masks, batch.usable)
    _, _, after = image_losses(training, moved)
    assert torch.equal(before, after)
    differs = (teacher(changed) != targets).any(dim=2)
    assert torch.equal(differs, batch.masks)


def test_with_all_patches_visible_the_encoder_is_the_vit_that_is_exported():
    model = make_model(blocks="last").eval()
    batch = _batch(model, 2)
    everything = torch.arange(16).repeat(2, 1)
    with torch.no_grad():
        encoded = model.encode(batch.images, everything)
    torch.testing.assert_close(encoded[:, 1:], model.tokens(batch.images), atol=1e-5, rtol=1e-5)


def test_the_representation_is_the_mean_of_the_normalized_blocks():
    model = make_model(student_args={"depth": 3}).eval()
    batch = _batch(model, 2)
    visible = torch.arange(6).repeat(2, 1)
    outputs = []
    with torch.no_grad():
        for block in range(3):
            model.blocks = (block,)
            outputs.append(model.encode(batch.images, visible))
        model.blocks = (0, 1, 2)
        together = model.encode(batch.images, visible)
    torch.testing.assert_close(together, sum(outputs) / 3)


def test_recomputing_blocks_changes_no_gradient():
    gradients = []
    for again in (False, True):
        model, teacher = make_model(checkpoint_blocks=again), make_teacher()
        losses = image_losses(make_small_training(model, teacher), _batch(model, 2))
        losses[0].sum().backward()
        gradients.append(model.encoder.blocks[0].attn.qkv.weight.grad)
    assert torch.equal(*gradients)


def test_students_with_registers_or_without_a_class_token_are_plain_too():
    for arguments in (
        {"depth": 1, "reg_tokens": 4},
        {"depth": 1, "class_token": False, "global_pool": "avg"},
        {"depth": 1, "no_embed_class": True, "reg_tokens": 2, "pre_norm": True},
    ):
        model = make_model(student_args=arguments, blocks="last").eval()
        batch = _batch(model, 2)
        with torch.no_grad():
            encoded = model.encode(batch.images, torch.arange(16).repeat(2, 1))
        prefix = model.encoder.num_prefix_tokens
        expected = model.tokens(batch.images)
        if "global_pool" in arguments:  # timm normalizes such a student after pooling only
            expected = torch.nn.functional.layer_norm(expected, expected.shape[-1:], eps=1e-6)
        torch.testing.assert_close(encoded[:, prefix:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("vit_bas_patch16_224", {}, "no such model.*vit_base_patch16_224"),
        ("resnet18", {}, "takes no image size.*plain VisionTransformer"),
        ("swin_tiny_patch4_window7_224", {}, "is a SwinTransformer.*plain VisionTransformer"),
        ("vit_base_r26_s32_224", {}, "plain VisionTransformer"),
        ("test_vit", {"depths": 2}, "does not take .*depths"),
        ("swin_tiny_patch4_window7_224", {"depth": 2}, "depth.*plain VisionTransformer"),
        ("test_vit", {"img_size": 96}, "give it as --image-size"),
        ("test_vit", {"patch_drop_rate": 0.5}, "patch_drop_rate: the mask drops patches already"),
        ("test_vit", {"pos_embed": "none"}, "no position embeddings"),
    ],
)
def test_a_student_that_is_no_plain_vit_is_refused(name, arguments, expected):
    config = make_config(options=SMALL | {"student": name, "student_args": arguments})
    with pytest.raises(UsageError, match=expected) as caught:
        make_student(config)
    assert "\n" not in str(caught.value)


def test_an_image_size_that_cuts_patches_is_refused():
    with pytest.raises(UsageError, match="70 is not a multiple of the student's patch of 16 px"):
        make_model(image_size=70)


def test_blocks_are_all_the_last_or_numbers():
    assert resolve_blocks("all", 3) == (0, 1, 2)
    assert resolve_blocks("last", 3) == (2,)
    assert resolve_blocks("2,0", 3) == (0, 2)
    for text in ("3", "-1", "first", "0,,1", ""):
        with pytest.raises(UsageError, match="expected all, last, or numbers from 0 to 2"):
            resolve_blocks(text, 3)


def test_the_decoders_last_block_computes_what_is_read_and_nothing_else():
    block = make_model(decoder_depth=1).decoder_blocks[0].double()
    tokens = torch.randn(2, 17, 32, dtype=torch.float64)
    torch.testing.assert_close(last_tokens(block, tokens, 6), block(tokens)[:, -6:])
    block.attn.fused_attn = False
    torch.testing.assert_close(last_tokens(block, tokens, 6), block(tokens)[:, -6:])


def test_both_kinds_of_attention_give_the_same_losses():
    losses = []
    for dtype in ("float32", "bfloat16"):
        model = make_model()
        training = make_small_training(model, make_teacher())
        choose_attention(model, torch.device("cpu"), dtype)
        assert model.encoder.blocks[0].attn.fused_attn is (dtype == "float32")
        losses.append(image_losses(training, _batch(model, 3))[0])
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
