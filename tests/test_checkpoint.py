"""Weights in and out, and that a stranger's file never runs code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pmvis_core.checkpoint import initialise, load_model, preset_for, save_model, save_official
from pmvis_core.config import ModelConfig, TrackerConfig
from pmvis_core.data.samples import ImageBatch
from pmvis_core.errors import DataError, PmvisError, ResourceError
from pmvis_core.models.idol import IDOL, build_idol
from pmvis_core.systems.presets import IMAGE_PRESETS
from pmvis_core.types import Category
from pmvis_core.weights.official import find_vocabulary

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


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("model.safetensors", ResourceError, "not a safetensors file"),
        ("model.pth", DataError, "which no tensor needs; it was not run"),
    ],
)
def test_a_pickle_posing_as_a_checkpoint_is_refused_and_not_run(
    name: str,
    kind: type[PmvisError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps({"model": Bomb()}))
    for read in (load_model, preset_for, lambda file: initialise(build(), file, CATEGORIES)):
        with pytest.raises(kind, match=message):
            read(tmp_path / name)
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


def saved(folder: Path, model: IDOL, categories: tuple[Category, ...]) -> Path:
    """Write a model of the tiny preset."""
    save_model(folder / "m", model.state_dict(), model.config, categories, TrackerConfig())
    return folder / "m"


def test_a_new_vocabulary_keeps_all_but_the_class_heads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = build(2, seed=1)
    model = build(5)
    fresh = {name: t.clone() for name, t in model.state_dict().items() if "class_embed" in name}
    others = tuple(Category(i, f"c{i}") for i in range(1, 6))
    report = initialise(model, saved(tmp_path, source, CATEGORIES), others)
    assert set(report.reinitialised) == set(fresh)
    assert "differs from the initial model's (2 categories, here 5: c1, c2, c3, …)" in caplog.text
    for name, tensor in model.state_dict().items():
        wanted = fresh[name] if name in fresh else source.state_dict()[name]
        assert torch.equal(tensor, wanted), name


def test_the_same_vocabulary_keeps_the_class_heads(tmp_path: Path) -> None:
    source, model = build(2, seed=1), build(2)
    report = initialise(model, saved(tmp_path, source, CATEGORIES), CATEGORIES)
    assert report.reinitialised == ()
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in model.state_dict().items())
    renamed = (Category(1, "disc"), Category(2, "moon"))
    assert initialise(build(2), tmp_path / "m", renamed).reinitialised


def idol(classes: int) -> IDOL:
    """Build an IDOL that its published code could build too, small behind its backbone."""
    sizes = {"hidden_dim": 32, "feedforward_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    return build_idol(ModelConfig(queries=4, reid_dim=8, **sizes), classes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("classes", "file", "wanted", "kept"),
    [
        (80, "coco.pth", "ytvis2019", False),
        (80, "model.pth", "coco", True),
        (40, "model.pth", "ytvis2019", True),
        (40, "model.pth", "ytvis2021", True),
        (40, "idol_ytvis19.pth", "ytvis2021", False),
        (2, "model.pth", "mine", True),
        (40, "model.pth", "mine", False),
    ],
)
def test_a_published_model_keeps_its_class_head_where_the_names_agree(
    classes: int, file: str, wanted: str, kept: bool, tmp_path: Path
) -> None:
    categories = CATEGORIES if wanted == "mine" else find_vocabulary(wanted).categories
    save_official(tmp_path / file, idol(classes))
    report = initialise(idol(len(categories)), tmp_path / file, categories)
    assert bool(report.reinitialised) is not kept
    assert preset_for(tmp_path / file) == "resnet50"


def test_a_model_on_another_backbone_names_the_preset(tmp_path: Path) -> None:
    save_official(tmp_path / "r50.pth", idol(2))
    with pytest.raises(ResourceError, match="has the backbone resnet50, this run tiny") as error:
        initialise(build(), tmp_path / "r50.pth", CATEGORIES)
    assert "--preset resnet50" in str(error.value.hint)


def test_a_model_file_tells_its_preset(tmp_path: Path) -> None:
    assert preset_for(saved(tmp_path, build(), CATEGORIES)) == "tiny"


def test_metadata_of_others_are_refused(tmp_path: Path) -> None:
    for about in ("no json", "[1]", '{"model": {}, "tracker": {}, "categories": [{"x": 1}]}'):
        save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors", {"pmvis": about})
        with pytest.raises(ResourceError, match=r"metadata of .* are not pmvis's"):
            load_model(tmp_path / "m.safetensors")


def test_a_model_of_a_later_version_says_so(tmp_path: Path) -> None:
    about = {"model": {"backbone": "resnet7"}, "tracker": {}, "categories": []}
    save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors", {"pmvis": json.dumps(about)})
    with pytest.raises(ResourceError, match="backbone resnet7, which this version does not know"):
        load_model(tmp_path / "m.safetensors")


def test_a_loaded_model_has_no_uninitialised_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    loaded = load_model(saved(tmp_path, model, CATEGORIES)).model
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    images = ImageBatch.of([torch.rand(3, 64, 96) * 255])
    with torch.no_grad():
        assert torch.equal(model(images).logits, loaded(images).logits)
