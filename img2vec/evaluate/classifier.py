"""A timm model with the weights of an evaluated model and a new classifier."""

from typing import Any

from torch import nn

from tokdiv.errors import RunError, UsageError
from tokdiv.teachers.architecture import create_model
from tokdiv.teachers.spec import Triple
from tokdiv.teachers.teacher import Teacher

HEAD_STD = 2e-5  # standard deviation of the classifier's initial weights, as in MAE


def build_classifier(
    teacher: Teacher, num_classes: int, drop_path: float
) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """A trainable network with the teacher's weights and a new classifier.

    Returns:
        The network; the timm arguments that build it again; the names of the layers that start untrained.

    Raises:
        UsageError: handcrafted features, a user's own module, or a network cut at a block.
    """
    from timm.models.vision_transformer import VisionTransformer

    spec = teacher.spec
    if spec.is_handcrafted or spec.is_custom or spec.block is not None:
        what = "cut at a block" if spec.block is not None else f"'{spec.architecture}'"
        raise UsageError(f"{teacher.name} is {what}: fine-tuning takes whole timm models")
    arguments = {k: v for k, v in spec.arguments.items() if k != "img_size"}
    arguments["num_classes"] = num_classes
    if isinstance(teacher.module, VisionTransformer):
        # As in MAE: average pooling, then a new norm. The final norm, which normalized tokens, is dropped.
        arguments["global_pool"] = "avg"
        arguments.pop("fc_norm", None)
    own = {"num_classes": num_classes, "drop_path_rate": drop_path}
    given = {k: v for k, v in arguments.items() if k not in own}
    try:
        network = create_model(spec.architecture, given, teacher.name, **own, img_size=teacher.size)
    except TypeError:  # a ConvNet takes no img_size
        network = create_model(spec.architecture, given, teacher.name, **own)
    weights = teacher.module.state_dict()
    classifier = network.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise UsageError(f"{spec.architecture} has no linear classifier to fine-tune")
    nn.init.trunc_normal_(classifier.weight, std=HEAD_STD)
    nn.init.zeros_(classifier.bias)
    missing, _ = network.load_state_dict(weights, strict=False)
    untrained = sorted({name.rpartition(".")[0] for name in missing})
    backbone = ("blocks.", "stages.", "layer", "patch_embed", "stem")
    if any(name.startswith(backbone) for name in untrained):
        raise RunError(f"{teacher.name}: no weights for {', '.join(untrained)}")
    return network, arguments, untrained


def parameter_groups(
    network: nn.Module, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups with `lr_scale` = layer_decay ** (number of layers above), as in BEiT and MAE.

    Biases, norms and the embeddings that timm names have no weight decay.
    """
    from timm.optim import param_groups_layer_decay

    undecayed = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()  # type: ignore[operator]
    return param_groups_layer_decay(
        network,
        weight_decay=weight_decay,
        no_weight_decay_list=undecayed,
        layer_decay=layer_decay,
    )


def mean_and_std(teacher: Teacher) -> tuple[Triple, Triple]:
    """Mean and standard deviation of the RGB channels that the teacher normalizes with, in [0, 1]."""
    mean, std = (
        tuple((buffer.flatten() / 255).cpu().tolist()) for buffer in (teacher.mean, teacher.std)
    )
    return mean, std  # type: ignore[return-value]
