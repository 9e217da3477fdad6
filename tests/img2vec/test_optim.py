import math

import pytest
import torch
from small import make_model

from img2vec.config import make_config
from img2vec.optim import learning_rate, make_optimizer, parameter_groups


def test_weight_decay_is_on_matrices_and_not_on_biases_norms_tokens_or_positions():
    model = make_model()
    decayed, spared = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    with_decay = {names[id(p)] for p in decayed["params"]}
    without = {names[id(p)] for p in spared["params"]}
    assert all(name.endswith(".weight") and "norm" not in name for name in with_decay)
    assert {"encoder.cls_token", "mask_token", "encoder.blocks.0.norm1.weight"} <= without
    assert {"encoder.patch_embed.proj.weight", "head.weight", "global_head.0.weight"} <= with_decay
    frozen = {"encoder.pos_embed", "encoder.norm.weight", "encoder.norm.bias"}
    everything = set(names.values()) - frozen
    assert with_decay | without == everything
    assert not with_decay & without


def test_the_optimizer_is_maes():
    optimizer = make_optimizer(make_model(), 0.05)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["fused"]


def test_the_schedule_is_linear_then_a_cosine_to_zero():
    rates = [learning_rate(e, 800, 40, 2.4e-3) for e in (0, 10, 40, 420, 800)]
    assert rates == pytest.approx([0, 6e-4, 2.4e-3, 1.2e-3, 0], abs=1e-12)
    at = 40 + 760 / 3
    assert learning_rate(at, 800, 40, 1.0) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    assert learning_rate(0, 10, 0, 1.0) == 1.0
    assert learning_rate(5, 5, 5, 1.0) == 1.0
    above_zero = [learning_rate(e, 90, 10, 2.0, lowest=0.2) for e in (0, 5, 10, 50, 90)]
    assert above_zero == pytest.approx([0, 1.0, 2.0, 1.1, 0.2])


def test_the_peak_follows_the_global_batch():
    assert make_config().peak_lr(4096) == pytest.approx(1.5e-4 * 16)
    assert make_config(options={"lr": 0.1}).peak_lr(4096) == 0.1


def test_the_warm_up_is_40_epochs_or_a_tenth_of_a_short_run():
    assert make_config().warmup == 40
    assert make_config(options={"epochs": 100}).warmup == 10
    assert make_config(options={"epochs": 100, "warmup_epochs": 40}).warmup == 40
