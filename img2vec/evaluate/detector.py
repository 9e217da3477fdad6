"""Mask R-CNN on a backbone with a feature pyramid: torchvision's, with the heads of its second version.

The heads (arXiv 2111.11429): two convolutions in the region proposal network, four with a norm and one linear
layer for boxes, four with a norm for masks. The norm is LayerNorm behind a ViT, as in ViTDet, and BatchNorm
behind a ConvNet, as in torchvision.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from img2vec.evaluate.classifier import mean_and_std, parameter_groups
from img2vec.evaluate.pyramid import NUM_LEVELS, SimplePyramid, build_backbone
from img2vec.evaluate.settings import DetectSettings
from tokdiv.errors import UsageError
from tokdiv.run_dir import read_json, write_atomic
from tokdiv.teachers.load import load_teacher
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.teacher import Teacher

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Side of the smallest anchor in px: torchvision's, for images of about 1,000 px. Smaller images have smaller
# objects, but anchors below four strides would leave gaps. Each level's are twice as large as the one before.
ANCHOR, ANCHOR_IMAGE_SIZE, LEAST_ANCHOR = 32, 1024, 16


def build_detector(
    teacher: Teacher, num_classes: int, settings: DetectSettings
) -> tuple[MaskRCNN, list[str]]:
    """An untrained Mask R-CNN on a teacher's network.

    In training it takes images of at most image_size x image_size as they are; in evaluation images of any size,
    which it fits into that square. Either way the backbone sees them padded to the square.

    Args:
        num_classes: without the background.

    Returns:
        The detector; notes, one line each.
    """
    size, channels = settings.image_size, settings.channels
    if size % 32:
        raise UsageError(f"--image-size {size}: expected a multiple of 32, as {size - size % 32}")
    backbone, notes = build_backbone(
        teacher,
        size,
        channels=channels,
        drop_path=settings.drop_path,
        window=settings.window,
        global_blocks=settings.global_blocks,
        checkpoint_blocks=settings.checkpoint_blocks,
    )
    norm = LayerNorm2d if isinstance(backbone.pyramid, SimplePyramid) else nn.BatchNorm2d
    mean, std = mean_and_std(teacher)
    smallest = max(ANCHOR * size / ANCHOR_IMAGE_SIZE, LEAST_ANCHOR)
    anchors = AnchorGenerator(
        sizes=tuple((smallest * 2**level,) for level in range(NUM_LEVELS)),
        aspect_ratios=((0.5, 1.0, 2.0),) * NUM_LEVELS,
    )
    hidden = 4 * channels
    detector = MaskRCNN(
        backbone,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2),
        box_head=FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [hidden], norm_layer=norm),
        box_predictor=FastRCNNPredictor(hidden, num_classes + 1),
        box_batch_size_per_image=settings.proposals,
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=norm),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
        image_mean=mean,
        image_std=std,
        min_size=size,
        max_size=size,
        size_divisible=size,
        _skip_resize=True,  # in training alone: the augmentation has resized the images
    )
    heads = (detector.rpn.head, detector.roi_heads.box_predictor, detector.roi_heads.mask_predictor)
    for head in heads:
        head.register_forward_hook(_as_float32)
    return detector, notes


def _as_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """torchvision decodes boxes in the dtype of the deltas, and bfloat16 would round their corners by pixels."""
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(_as_float32(module, inputs, output) for output in outputs)
    return outputs.float()


def detector_groups(
    detector: MaskRCNN, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups with `lr_scale`: the backbone's fall from layer to layer, pyramid and heads have 1.

    Biases and norms take no weight decay.
    """
    body = detector.backbone.body
    groups = parameter_groups(body, weight_decay, layer_decay)
    for group in groups:  # timm gives the last block 1, where nothing follows it
        group["lr_scale"] *= layer_decay
    in_body = {id(parameter) for parameter in body.parameters()}
    rest = [parameter for parameter in detector.parameters() if id(parameter) not in in_body]
    for decayed in (True, False):
        parameters = [p for p in rest if (p.ndim > 1) == decayed]
        decay = weight_decay if decayed else 0.0
        groups.append({"params": parameters, "weight_decay": decay, "lr_scale": 1.0})
    return groups


# Saving and loading ------------------------------------------------------------------------------


def save_detector(
    detector: MaskRCNN,
    folder: Path,
    teacher: Teacher,
    classes: list[str],
    settings: DetectSettings,
) -> None:
    """Write FOLDER/model.safetensors and FOLDER/config.json."""
    spec = dataclasses.replace(teacher.spec, weights="random", sha256=None, size=teacher.size)
    config = {
        "task": "detect",
        "spec": spec.to_dict(),
        "classes": classes,
        "settings": dataclasses.asdict(settings),
    }
    state: dict[str, Tensor] = {k: v.contiguous() for k, v in detector.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / WEIGHTS, save(state))
    write_atomic(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def load_detector(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[MaskRCNN, list[str]]:
    """Load what `img2vec detect` wrote to DIR/model.

    Returns:
        The detector in eval mode: it takes a list of float images (3, H, W) in [0, 1], and returns for each
        boxes, labels (from 1), scores and masks. The names of its classes: label n is classes[n - 1].

    Raises:
        UsageError: the folder holds no detector.
    """
    folder = Path(folder)
    try:
        config = read_json(folder / CONFIG)
        spec = TeacherSpec.from_dict(config["spec"])
        settings = DetectSettings(**config["settings"])
        classes = list(config["classes"])
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"'{folder}' holds no detector ({error}); expected DIR/model of img2vec detect"
        ) from None
    detector, _ = build_detector(load_teacher(spec), len(classes), settings)
    detector.load_state_dict(state)
    return detector.to(device).eval(), classes
