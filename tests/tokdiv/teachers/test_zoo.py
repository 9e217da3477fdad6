"""The zoo's literals held to timm: configurations, and counts from weightless (meta) networks."""

import re

import pytest
import timm
import torch

from tokdiv.teachers.load import has_final_norm
from tokdiv.teachers.spec import TeacherSpec
from tokdiv.teachers.zoo import COUNTS, GROUPS, ZOO

NETWORKS = [spec for spec in ZOO.values() if not spec.is_handcrafted]
FROM_TIMM = [spec for spec in NETWORKS if (spec.weights or "").startswith("hf-hub:")]
FROM_AUTHORS = [spec for spec in NETWORKS if (spec.weights or "").startswith("https:")]


def name(spec: TeacherSpec) -> str:
    return spec.name


@pytest.mark.parametrize("spec", FROM_TIMM, ids=name)
def test_an_entry_from_timm_says_what_timm_s_configuration_says(spec: TeacherSpec):
    tag = (spec.weights or "").partition(".")[2]
    published = timm.get_pretrained_cfg(f"{spec.architecture}.{tag}")
    assert published is not None, f"timm has no {spec.architecture}.{tag}"
    assert spec.weights == f"hf-hub:{published.hf_hub_id}"
    assert spec.architecture == published.architecture
    assert (spec.mean, spec.std) == (tuple(published.mean), tuple(published.std))
    assert spec.input_size == published.input_size[1] == published.input_size[2]
    assert spec.interpolation == published.interpolation
    assert spec.license == published.license


@pytest.mark.parametrize("spec", FROM_TIMM, ids=name)
def test_no_entry_computes_otherwise_than_timm_s_notes_say(spec: TeacherSpec):
    tag = (spec.weights or "").partition(".")[2]
    for note in timm.get_pretrained_cfg(f"{spec.architecture}.{tag}").notes or ():
        assert ("QuickGELU" in note) <= ("quickgelu" in spec.architecture), note


def test_clip_s_vit_computes_with_quickgelu():
    with torch.device("meta"):
        model = timm.create_model(ZOO["clip_vit_base"].architecture)
    assert type(model.blocks[0].mlp.act).__name__ == "QuickGELU"


@pytest.mark.parametrize("spec", NETWORKS, ids=name)
def test_counts_and_norm_are_those_of_the_network(spec: TeacherSpec):
    with torch.device("meta"):
        model = timm.create_model(spec.architecture, num_classes=0, **spec.arguments)
        assert spec.norm is has_final_norm(model)
        model.prune_intermediate_layers(1, prune_norm=not spec.norm, prune_head=True)
    counts = COUNTS[spec.name]
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    assert counts.dim == model.num_features
    # K at 224 px by the stride; a forward pass of each kind holds it below.
    stride = model.feature_info[-1]["reduction"]
    assert counts.num_tokens == (224 // stride) ** 2


@pytest.mark.parametrize(
    "spec",
    [
        ZOO["mae_vit_base"],
        ZOO["dinov2_vit_small_reg"],
        ZOO["dinov3_vit_small"],
        ZOO["dinov3_convnext_tiny"],
        ZOO["clip_vit_base"],
        ZOO["clip_resnet50"],
        ZOO["fcmae_convnextv2_tiny"],
        ZOO["mae_hiera_small"],
        ZOO["supervised_deit_base"],
        ZOO["dino_resnet50"],
    ],
    ids=name,
)
def test_k_and_c_are_those_of_a_forward_pass(spec: TeacherSpec):
    with torch.device("meta"), torch.no_grad():
        try:
            model = timm.create_model(spec.architecture, num_classes=0, img_size=224)
        except TypeError:
            model = timm.create_model(spec.architecture, num_classes=0)
        planes = model.eval().forward_intermediates(
            torch.zeros(1, 3, 224, 224), indices=1, output_fmt="NCHW", intermediates_only=True
        )[0]
    counts = COUNTS[spec.name]
    assert planes.shape[1] == counts.dim
    assert planes.shape[2] * planes.shape[3] == counts.num_tokens


def test_the_authors_urls_are_verbatim():
    facebook = "https://dl.fbaipublicfiles.com"
    assert {spec.name: spec.weights for spec in FROM_AUTHORS} == {
        "dino_resnet50": f"{facebook}/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
        "simclr_resnet50": f"{facebook}/vissl/model_zoo/"
        "simclr_rn50_800ep_simclr_8node_resnet_16_07_20.7e8feed1/model_final_checkpoint_phase799.torch",
        "mocov3_resnet50": f"{facebook}/moco-v3/r-50-1000ep/r-50-1000ep.pth.tar",
        "mocov3_vit_base": f"{facebook}/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar",
        "ibot_vit_base": "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/"
        "ibot/vitb_16/checkpoint_teacher.pth",
    }


def test_no_two_entries_share_a_file_in_the_cache():
    from tokdiv.teachers.cache import cached_path

    paths = [cached_path(spec.weights or "") for spec in NETWORKS]
    assert len(set(paths)) == len(paths)


def test_every_entry_states_what_a_reader_asks_for():
    for key, spec in ZOO.items():
        assert key == spec.name
        assert spec.method and re.fullmatch(r"arXiv:\d{4}\.\d{5}", spec.paper or "")
        assert spec.input_size and spec.mean and spec.std and spec.norm is not None
        assert all(COUNTS[key][:2]) and (COUNTS[key].parameters > 0) is not spec.is_handcrafted
        assert (spec.weights is None) == (spec.license is None) == spec.baseline


def test_only_pixels_and_hog_are_baselines():
    # Trained on labels is still trained: those may be chosen.
    assert [spec.name for spec in ZOO.values() if spec.baseline] == ["pixels", "hog"]


def test_every_kind_that_is_promised_is_there():
    methods = {spec.method for spec in ZOO.values()}
    assert methods >= {"MAE", "DINO", "DINOv2", "DINOv3", "CLIP", "FCMAE", "iBOT", "MoCo v3"}
    assert methods >= {"SimCLR", "supervised", "RGB patches", "oriented gradients"}
    for size in ("small", "base", "large"):
        assert f"dinov2_vit_{size}" in ZOO and f"dinov2_vit_{size}_reg" in ZOO


def test_groups_name_entries_of_the_zoo():
    assert GROUPS["paper"] == ("mae_vit_base", "mae_vit_large", "dino_vit_base", "dino_resnet50")
    for members in GROUPS.values():
        assert set(members) <= set(ZOO)
    assert not set(GROUPS) & set(ZOO)
