"""Fine-tuning: the recipe's pieces against closed forms, and the command end to end."""

import copy
import json
import os
import signal
import sys

import pytest
import timm
import torch
import torch.nn.functional as F

from img2vec.evaluate import finetune, knn, load_encoder
from img2vec.evaluate.augment import TrainingBatch, TrainingStep
from img2vec.evaluate.classifier import build_classifier, parameter_groups
from img2vec.evaluate.settings import Recipe
from img2vec.evaluate.supervised import accumulate_gradient, make_mixing
from tokdiv.dist import current_processes
from tokdiv.errors import Interrupted, UsageError

FAST = {"epochs": 2, "batch_size": 16, "warmup_epochs": 1, "workers": 0, "dtype": "float32"}


def recipe(**changes):
    fields = {"batch_size": 6, "micro_batch_size": 6, "lr": 1e-3, "image_size": 32}
    off = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}
    return Recipe(**{**fields, **off, "dtype": "float32", **changes})


def layer_of(name: str, depth: int) -> int:
    """MAE's counting: embeddings 0, block i is i + 1, what follows is depth + 1."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def test_learning_rates_fall_by_the_layer_and_norms_do_not_decay(tiny):
    depth, decay = 2, 0.65
    network, _, _ = build_classifier(load_encoder(tiny, dtype="float32"), 6, drop_path=0.1)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = parameter_groups(network, weight_decay=0.05, layer_decay=decay)
    seen = set()
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert group["lr_scale"] == pytest.approx(
                decay ** (depth + 1 - layer_of(name, depth))
            ), name
            undecayed = parameter.ndim <= 1 or name in ("cls_token", "pos_embed")
            assert group["weight_decay"] == (0.0 if undecayed else 0.05), name
    assert seen == set(names.values())


def test_classifier_starts_from_the_models_weights_and_a_small_head(tiny):
    encoder = load_encoder(tiny, dtype="float32")
    network, arguments, fresh = build_classifier(encoder, 6, drop_path=0.1)
    assert fresh == ["fc_norm", "head"]
    assert arguments["global_pool"] == "avg"
    assert network.head.weight.abs().max() < 2e-4
    assert isinstance(network.norm, torch.nn.Identity)
    assert torch.equal(network.blocks[1].mlp.fc1.weight, encoder.module.blocks[1].mlp.fc1.weight)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert [block.drop_path1.drop_prob for block in network.blocks[1:]] == [pytest.approx(0.1)]


def test_a_convnet_can_be_fine_tuned_too():
    encoder = load_encoder("timm:resnet18@random:size=32")
    network, _, fresh = build_classifier(encoder, 4, drop_path=0.1)
    assert fresh == ["fc"]
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 4)


@pytest.mark.parametrize("spec", ["pixels", "timm:vit_tiny_patch16_224@random:depth=2:blocks=0"])
def test_what_is_no_whole_network_is_refused(pictures, spec):
    with pytest.raises(UsageError, match="fine-tuning takes whole timm models"):
        finetune(spec, *pictures, image_size=32, **FAST)


def step_of(images, labels, micro_batch_size, num_images=None):
    """A training step of one process."""
    parts = list(zip(images.split(micro_batch_size), labels.split(micro_batch_size)))
    batches = [TrainingBatch(view, target, torch.arange(len(view)), []) for view, target in parts]
    return TrainingStep(0, 0, 1, num_images or len(images), len(batches), iter(batches))


def test_small_forward_passes_add_up_to_the_gradient_of_the_whole_batch(tiny):
    network, _, _ = build_classifier(load_encoder(tiny, dtype="float32"), 6, drop_path=0.0)
    torch.nn.init.normal_(network.head.weight)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 32, 32, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    twin = copy.deepcopy(network)
    F.cross_entropy(twin(images), labels, label_smoothing=0.1).backward()
    expected_loss = F.cross_entropy(twin(images), labels, label_smoothing=0.1).item()
    # With 8 images, two of which cannot be used, the mean is over the other six.
    for micro_batch_size, batch_size in ((6, 6), (4, 6), (1, 6), (4, 8)):
        network.zero_grad()
        step = step_of(images, labels, micro_batch_size, batch_size)
        settings = recipe(batch_size=batch_size, micro_batch_size=micro_batch_size)
        loss, skipped = accumulate_gradient(network, step, settings, None, current_processes())
        for mine, expected in zip(network.parameters(), twin.parameters()):
            torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-4, atol=1e-6)
        assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
        assert skipped == []


def test_a_batch_without_usable_images_moves_nothing(tiny):
    network, _, _ = build_classifier(load_encoder(tiny, dtype="float32"), 6, drop_path=0.0)
    nothing = torch.empty(0).long()
    batch = TrainingBatch(torch.empty(0, 3, 32, 32), nothing, nothing, [3])
    step = TrainingStep(0, 0, 1, 6, 1, iter([batch]))
    loss, skipped = accumulate_gradient(network, step, recipe(), None, current_processes())
    assert loss == 0
    assert skipped == [3]
    assert all(parameter.grad.abs().max() == 0 for parameter in network.parameters())


def test_mixing_keeps_smoothed_targets_of_total_one():
    mixing = make_mixing(recipe(mixup=0.8, cutmix=1.0), num_classes=6)
    _, targets = mixing(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    assert targets.min().item() == pytest.approx(0.1 / 6)
    assert make_mixing(recipe(), 6) is None


def test_fine_tuning_learns_and_leaves_a_model_that_timm_loads(pictures, tiny, tmp_path):
    before = torch.get_rng_state()
    results = finetune(
        tiny,
        *pictures,
        tmp_path / "out",
        epochs=12,
        batch_size=16,
        warmup_epochs=2,
        lr=5e-3,
        mixup=0.0,
        cutmix=0.0,
        auto_augment="",
        reprob=0.0,
        workers=0,
        dtype="float32",
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert results.metrics["top1"] > 0.6
    assert set(results.metrics) == {"top1", "top5", "loss"}
    assert results.history[-1]["loss"] < results.history[0]["loss"]
    assert results.history[-1]["val_top1"] == results.metrics["top1"]
    assert results.data["train"]["skipped"] == 1
    assert results.data["val"] | {"name": "", "fingerprint": ""} == {
        "name": "",
        "fingerprint": "",
        "images": 23,
        "skipped": 1,
    }
    assert "starts untrained: fc_norm, head" in results.notes
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["task"] == "finetune"

    loaded = timm.create_model(f"local-dir:{tmp_path}/out/model", pretrained=True).eval()
    assert loaded(torch.zeros(1, 3, 32, 32)).shape == (1, 6)
    assert loaded.pretrained_cfg["label_names"] == ["apple", "bird", "cat", "dog", "egg", "fish"]
    # And the fine-tuned encoder can be measured again.
    assert knn(tmp_path / "out" / "model", *pictures, k=(5,)).metrics["top1_k5"] > 0.5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_an_interrupted_fine_tuning_ends_as_if_it_had_not_been(
    pictures, tiny, tmp_path, monkeypatch, number
):
    options = {**FAST, "epochs": 3, "micro_batch_size": 6}
    whole = finetune(tiny, *pictures, tmp_path / "whole", **options)

    module = sys.modules["img2vec.evaluate.finetune"]
    step, steps = module.train_step, []

    def step_and_signal(*arguments):
        steps.append(1)
        if len(steps) == 8:  # in the third epoch, of three steps each
            os.kill(os.getpid(), number)
        return step(*arguments)

    monkeypatch.setattr(module, "train_step", step_and_signal)
    with pytest.raises(Interrupted, match="interrupted after 2 epochs") as interrupted:
        finetune(tiny, *pictures, tmp_path / "cut", **options)
    assert interrupted.value.signal == number
    assert len(steps) == 8
    monkeypatch.undo()
    with pytest.raises(UsageError, match="is of a fine-tuning with other settings"):
        finetune(tiny, *pictures, tmp_path / "cut", **{**options, "seed": 1})
    resumed = finetune(tiny, *pictures, tmp_path / "cut", **options)
    assert resumed.history == whole.history
    assert resumed.metrics == whole.metrics
    weights = [
        timm.create_model(f"local-dir:{tmp_path}/{run}/model", pretrained=True).state_dict()
        for run in ("whole", "cut")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert resumed.data["train"]["skipped"] == 1


def test_a_damaged_checkpoint_is_named(pictures, tiny, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UsageError, match=r"checkpoint.*delete it to start anew"):
        finetune(tiny, *pictures, tmp_path, **FAST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "--epochs 0: expected a whole number"),
        ({"batch_size": 1}, "a batch of 1 images for 1 processes: each needs two or more"),
        ({"micro_batch_size": 0}, "--micro-batch-size 0: expected a whole number"),
    ],
)
def test_mistakes_in_the_call_are_named(pictures, tiny, options, message):
    with pytest.raises(UsageError, match=message):
        finetune(tiny, *pictures, **{**FAST, **options})
