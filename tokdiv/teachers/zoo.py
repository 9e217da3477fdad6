"""The zoo: published teachers by name, as a literal table.

Names, sizes, means, deviations and licenses are those of timm's `pretrained_cfg`; a test holds them, and the
counts of tokens (K, at the default view of 224 px), channels (C) and parameters, to timm. Weights that timm
lacks come from their authors' own URLs, under the authors' licenses.
"""

from functools import partial
from typing import Any, NamedTuple

from tokdiv.teachers.spec import TeacherSpec

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

FACEBOOK = "https://dl.fbaipublicfiles.com"
SIMCLR_RUN = "simclr_rn50_800ep_simclr_8node_resnet_16_07_20.7e8feed1"
BYTEDANCE = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource"
SAMPLES = "package:samples/teachers"


class Counts(NamedTuple):
    """K at 224 px, C, and the parameters without a classifier."""

    num_tokens: int
    dim: int
    parameters: int


def _cfg(
    name: str,
    model: str,
    num_tokens: int,
    dim: int,
    parameters: int,
    group: dict[str, Any],
    **fields: Any,
) -> tuple[TeacherSpec, Counts]:
    """An entry of the zoo.

    Args:
        model: a timm architecture, with a tag where the weights are timm's.
        group, fields: fields of TeacherSpec.
    """
    base: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "input_size": 224}
    given = base | group | fields
    if "." in model:
        given["weights"] = f"hf-hub:timm/{model}"
    return TeacherSpec(name, model.partition(".")[0], **given), Counts(num_tokens, dim, parameters)


_vit = partial(_cfg, norm=True)
_map = partial(_cfg, norm=False)  # feature maps, whose tokens have no final norm

# fmt: off
MAE = {"method": "MAE", "license": "cc-by-nc-4.0", "paper": "arXiv:2111.06377"}
HIERA = MAE | {"paper": "arXiv:2306.00989"}
DINO = {"method": "DINO", "license": "apache-2.0", "paper": "arXiv:2104.14294"}
DINOV2 = DINO | {"method": "DINOv2", "paper": "arXiv:2304.07193", "input_size": 518}
DINOV2_REG = DINOV2 | {"paper": "arXiv:2309.16588"}
DINOV3 = {"method": "DINOv3", "license": "dinov3-license", "paper": "arXiv:2508.10104"}
DINOV3_VIT = DINOV3 | {"input_size": 256}
CLIP = {"method": "CLIP", "license": "apache-2.0", "paper": "arXiv:2103.00020", "mean": CLIP_MEAN, "std": CLIP_STD}
FCMAE = {"method": "FCMAE", "license": "cc-by-nc-4.0", "paper": "arXiv:2301.00808"}
MOCO_V3 = {"method": "MoCo v3", "license": "cc-by-nc-4.0", "paper": "arXiv:2104.02057"}
SIMCLR = {"method": "SimCLR", "license": "mit", "paper": "arXiv:2002.05709"}
IBOT = {"method": "iBOT", "license": "apache-2.0", "paper": "arXiv:2111.07832"}
TV_RESNET = {"method": "supervised", "license": "bsd-3-clause", "paper": "arXiv:1512.03385"}
DEIT = {"method": "supervised", "license": "apache-2.0", "paper": "arXiv:2012.12877"}
RGB = {"method": "RGB patches", "paper": "arXiv:2111.06377"}
MASKFEAT = {"method": "oriented gradients", "paper": "arXiv:2112.09133"}
# Tiny, trained by benchmarks/train_sample_teachers.py: they ship with the package, for a first try.
SAMPLE_MAE = MAE | {"input_size": 96}
SAMPLE_DINO = DINO | {"license": "cc-by-nc-4.0", "input_size": 96}

_ENTRIES = (
    _vit("mae_vit_base", "vit_base_patch16_224.mae", 196, 768, 85_798_656, MAE),
    _vit("mae_vit_large", "vit_large_patch16_224.mae", 196, 1024, 303_301_632, MAE),
    _vit("mae_vit_huge", "vit_huge_patch14_224.mae", 256, 1280, 630_764_800, MAE),
    _vit("dino_vit_small", "vit_small_patch16_224.dino", 196, 384, 21_665_664, DINO),
    _vit("dino_vit_small_patch8", "vit_small_patch8_224.dino", 784, 384, 21_670_272, DINO),
    _vit("dino_vit_base", "vit_base_patch16_224.dino", 196, 768, 85_798_656, DINO),
    _vit("dino_vit_base_patch8", "vit_base_patch8_224.dino", 784, 768, 85_807_872, DINO),
    _vit("dinov2_vit_small", "vit_small_patch14_dinov2.lvd142m", 256, 384, 22_056_192, DINOV2),
    _vit("dinov2_vit_base", "vit_base_patch14_dinov2.lvd142m", 256, 768, 86_579_712, DINOV2),
    _vit("dinov2_vit_large", "vit_large_patch14_dinov2.lvd142m", 256, 1024, 304_367_616, DINOV2),
    _vit("dinov2_vit_small_reg", "vit_small_patch14_reg4_dinov2.lvd142m", 256, 384, 22_057_344, DINOV2_REG),
    _vit("dinov2_vit_base_reg", "vit_base_patch14_reg4_dinov2.lvd142m", 256, 768, 86_582_016, DINOV2_REG),
    _vit("dinov2_vit_large_reg", "vit_large_patch14_reg4_dinov2.lvd142m", 256, 1024, 304_370_688, DINOV2_REG),
    _vit("dinov3_vit_small", "vit_small_patch16_dinov3.lvd1689m", 196, 384, 21_586_944, DINOV3_VIT),
    _vit("dinov3_vit_small_plus", "vit_small_plus_patch16_dinov3.lvd1689m", 196, 384, 28_683_264, DINOV3_VIT),
    _vit("dinov3_vit_base", "vit_base_patch16_dinov3.lvd1689m", 196, 768, 85_641_216, DINOV3_VIT),
    _vit("dinov3_vit_large", "vit_large_patch16_dinov3.lvd1689m", 196, 1024, 303_079_424, DINOV3_VIT),
    _vit("dinov3_vit_huge_plus", "vit_huge_plus_patch16_dinov3.lvd1689m", 196, 1280, 840_509_440, DINOV3_VIT),
    _map("dinov3_convnext_tiny", "convnext_tiny.dinov3_lvd1689m", 49, 768, 27_818_592, DINOV3),
    _map("dinov3_convnext_small", "convnext_small.dinov3_lvd1689m", 49, 768, 49_453_152, DINOV3),
    _map("dinov3_convnext_base", "convnext_base.dinov3_lvd1689m", 49, 1024, 87_564_416, DINOV3),
    _map("dinov3_convnext_large", "convnext_large.dinov3_lvd1689m", 49, 1536, 196_227_264, DINOV3),
    # OpenAI trained with QuickGELU; timm's vit_base_patch16_clip_224 computes with GELU on the same weights.
    _vit("clip_vit_base", "vit_base_patch16_clip_quickgelu_224", 196, 768, 85_799_424, CLIP,
         weights="hf-hub:timm/vit_base_patch16_clip_224.openai"),
    _map("clip_resnet50", "resnet50_clip.openai", 49, 2048, 23_527_264, CLIP, license="mit"),
    _map("fcmae_convnextv2_tiny", "convnextv2_tiny.fcmae", 49, 768, 27_864_960, FCMAE),
    _map("fcmae_convnextv2_base", "convnextv2_base.fcmae", 49, 1024, 87_690_752, FCMAE),
    _map("fcmae_convnextv2_large", "convnextv2_large.fcmae", 49, 1536, 196_416_768, FCMAE),
    _map("mae_hiera_small", "hiera_small_224.mae", 49, 768, 34_237_536, HIERA),
    _map("mae_hiera_base", "hiera_base_224.mae", 49, 768, 50_754_432, HIERA),
    _map("mae_hiera_large", "hiera_large_224.mae", 49, 1152, 212_584_608, HIERA),
    _map("supervised_resnet50", "resnet50.tv_in1k", 49, 2048, 23_508_032, TV_RESNET, interpolation="bilinear"),
    _vit("supervised_deit_base", "deit_base_patch16_224.fb_in1k", 196, 768, 85_798_656, DEIT),
    _map("dino_resnet50", "resnet50", 49, 2048, 23_508_032, DINO,
         weights=f"{FACEBOOK}/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth"),
    _map("simclr_resnet50", "resnet50", 49, 2048, 23_508_032, SIMCLR,
         weights=f"{FACEBOOK}/vissl/model_zoo/{SIMCLR_RUN}/model_final_checkpoint_phase799.torch"),
    _map("mocov3_resnet50", "resnet50", 49, 2048, 23_508_032, MOCO_V3,
         weights=f"{FACEBOOK}/moco-v3/r-50-1000ep/r-50-1000ep.pth.tar"),
    _vit("mocov3_vit_base", "vit_base_patch16_224", 196, 768, 85_798_656, MOCO_V3,
         weights=f"{FACEBOOK}/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"),
    _vit("ibot_vit_base", "vit_base_patch16_224", 196, 768, 85_798_656, IBOT,
         weights=f"{BYTEDANCE}/archive/2022/ibot/vitb_16/checkpoint_teacher.pth"),
    _vit("sample_mae_vit", "vit_tiny_patch16_224", 196, 192, 1_965_504, SAMPLE_MAE, arguments={"depth": 4},
         weights=f"{SAMPLES}/sample_mae_vit.safetensors",
         sha256="e9b2ac6ca8b94685f8c036588750fc5554938c922c65e13897efa0a99c6c0fb8"),
    _vit("sample_dino_vit", "vit_tiny_patch16_224", 196, 192, 1_965_504, SAMPLE_DINO, arguments={"depth": 4},
         weights=f"{SAMPLES}/sample_dino_vit.safetensors",
         sha256="61822693aa9bea297349b6e65b68d292da62c8addfc64b38385998123ced4220"),
    _map("sample_dino_resnet", "resnet10t", 49, 256, 1_263_032, SAMPLE_DINO,
         arguments={"channels": [32, 64, 128, 256]},
         weights=f"{SAMPLES}/sample_dino_resnet.safetensors",
         sha256="685835a4be706e5e306068ff0f49c49b707dd1c0cbf715833cf2f333545253f1"),
    _map("pixels", "pixels", 196, 768, 0, RGB),
    _map("hog", "hog", 196, 108, 0, MASKFEAT),
)
# fmt: on

ZOO = {spec.name: spec for spec, _ in _ENTRIES}
COUNTS = {spec.name: counts for spec, counts in _ENTRIES}

GROUPS = {
    "paper": ("mae_vit_base", "mae_vit_large", "dino_vit_base", "dino_resnet50"),
    "sample": ("sample_mae_vit", "sample_dino_vit", "sample_dino_resnet"),
    "classical": ("pixels", "hog"),
}
"""Several teachers under one name; `paper` is the set of Img2Vec (arXiv:2304.12535), Table 1."""
