"""Published checkpoints: every name and shape, what follows from them, and the golden answer."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pmvis_core.checkpoint import KeyReport, load_model, read_model, save_model, save_official
from pmvis_core.config import ModelConfig, TrackerConfig
from pmvis_core.data.samples import ImageBatch
from pmvis_core.errors import DataError, PmvisError, ResourceError, UsageError
from pmvis_core.models.idol import build_idol
from pmvis_core.nn.dynamic_mask import dynamic_masks
from pmvis_core.systems.presets import IMAGE_PRESETS
from pmvis_core.weights.files import read_file
from pmvis_core.weights.official import (
    COCO,
    VOCABULARIES,
    choose_vocabulary,
    find_vocabulary,
    from_official,
    infer_architecture,
    published_thresholds,
    to_official,
    to_official_name,
)
from tests.golden_idol import load_recipe
from tests.official_files import SMALL, empty, small_file

CASES = {
    "names_shapes": ("resnet50", 40),
    "names_shapes_ytvis21": ("resnet50", 40),
    "names_shapes_ovis": ("resnet50", 25),
    "names_shapes_coco": ("resnet50", 80),
    "names_shapes_r101": ("resnet101", 40),
    "names_shapes_swinL": ("swin_l", 40),
}
ITER = "criterion._iter"


def published(shared: Path, name: str) -> list[dict[str, Any]]:
    """Return the reference's list of names and shapes."""
    rows: list[dict[str, Any]] = json.loads((shared / f"golden/idol/{name}.json").read_text())
    return rows


@pytest.mark.parametrize("name", CASES)
def test_every_published_name_and_shape_goes_both_ways(name: str, shared: Path) -> None:
    rows = published(shared, name)
    file = {row["name"]: empty(row["shape"], row["dtype"]) for row in rows}
    sorted_out = from_official({**file, ITER: torch.zeros(1)})
    assert sorted_out.unexpected == (ITER,)
    assert list(sorted_out.aliased) == [row["name"] for row in rows if row.get("alias_of")]
    shapes = {n: tensor.shape for n, tensor in sorted_out.tensors.items()}
    config, classes = infer_architecture(shapes)
    assert config == ModelConfig(backbone=CASES[name][0])
    assert classes == CASES[name][1]
    with torch.device("meta"):
        ours = build_idol(config, classes).state_dict()
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in sorted_out.tensors.items()
    }
    back = to_official(sorted_out.tensors, config)
    assert {n: (t.shape, t.dtype) for n, t in back.items()} == {
        n: (t.shape, t.dtype) for n, t in file.items()
    }
    for row in rows:
        if row.get("alias_of"):
            assert back[row["name"]] is back[row["alias_of"]]


@pytest.fixture(scope="module")
def golden_file(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file as PM-VIS saves it, with the golden weights."""
    recipe = load_recipe(shared)
    rows = published(shared, "names_shapes")
    model = OrderedDict(
        (row["name"], torch.from_numpy(recipe.values(row["name"], row["shape"]))) for row in rows
    )
    model[ITER] = torch.tensor([7.0])
    file = tmp_path_factory.mktemp("official") / "idol_ytvis19_r50.pth"
    # A number of numpy's, as schedulers leave them there, makes torch's own reader refuse the file.
    extras = {"iteration": 11999, "scheduler": {"base_lrs": [np.float64(1e-4)]}}
    torch.save({"model": model, **extras}, file)
    return file


def test_an_official_file_gives_the_reference_answer(golden_file: Path, shared: Path) -> None:
    checkpoint = load_model(golden_file)
    golden = np.load(shared / "golden/idol/A1_r50_96x128.npz")
    image = torch.from_numpy(golden["image"]).permute(2, 0, 1).float()
    with torch.no_grad():
        out = checkpoint.model(ImageBatch.of([image]))
    np.testing.assert_allclose(out.logits[-1], golden["pred_logits"], atol=4e-4, rtol=0)
    np.testing.assert_allclose(out.boxes[-1], golden["pred_boxes"], atol=3e-5, rtol=0)
    np.testing.assert_allclose(out.embeddings, golden["pred_inst_embed"], atol=2e-4, rtol=0)
    np.testing.assert_allclose(out.mask_features, golden["mask_feats"], atol=3e-4, rtol=0)
    assert checkpoint.categories == find_vocabulary("ytvis2019").categories
    assert checkpoint.tracker == TrackerConfig()
    report = checkpoint.report
    assert "IDOL on resnet50, 300 queries, 40 categories (ytvis2019: person, giant" in report.title
    counts = {name: len(value) for name, value in vars(report).items() if name != "title"}
    assert counts == {
        "loaded": 583,
        "aliased": 36,
        "reinitialised": 0,
        "missing": 0,
        "unexpected": 1,
    }


def test_a_file_there_and_back_is_the_same(golden_file: Path, shared: Path, tmp_path: Path) -> None:
    first = load_model(golden_file)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.pth"
    save_model(ours, first.model.state_dict(), first.model.config, first.categories, first.tracker)
    second = load_model(ours)
    assert second.categories == first.categories
    save_official(theirs, second.model)
    content = torch.load(theirs, weights_only=True)
    assert list(content) == ["model"]
    original, _ = read_file(golden_file)
    assert set(original) == {*content["model"], ITER}
    assert all(torch.equal(original[name], tensor) for name, tensor in content["model"].items())
    rows = {row["name"]: row["shape"] for row in published(shared, "names_shapes")}
    assert {name: list(tensor.shape) for name, tensor in content["model"].items()} == rows


def test_the_same_model_gives_the_same_official_bytes(tmp_path: Path) -> None:
    model = load_model(small_file(tmp_path / "a.pth")).model
    for name in ("b.pth", "c.pth"):
        save_official(tmp_path / name, model)
    assert (tmp_path / "b.pth").read_bytes() == (tmp_path / "c.pth").read_bytes()


def containers() -> dict[str, Any]:
    """Return ways to write the same tensors."""
    from safetensors.torch import save_file

    def numpy_pickle(tensors: dict[str, Tensor], file: Path) -> None:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        file.write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, 2))

    def torch_with_arrays(tensors: dict[str, Tensor], file: Path) -> None:
        torch.save({"model": {name: tensor.numpy() for name, tensor in tensors.items()}}, file)

    return {
        "model.pth": lambda tensors, file: torch.save({"model": tensors}, file),
        "bare.pth": torch.save,
        "old.pth": lambda tensors, file: torch.save(
            tensors, file, _use_new_zipfile_serialization=False
        ),
        "wrapped.pth": lambda tensors, file: torch.save(
            {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}, file
        ),
        "arrays.pth": torch_with_arrays,
        "arrays.pkl": numpy_pickle,
        "hub.safetensors": save_file,
        "no_suffix": save_file,
    }


@pytest.mark.parametrize("name", containers())
def test_every_container_holds_the_same_tensors(name: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        to_official_name("transformer.level_embed"): torch.rand(4, 8, generator=generator),
        "detr.detr.class_embed.0.bias": torch.rand(25, generator=generator),
        "count": torch.tensor([3]),
    }
    containers()[name](tensors, tmp_path / name)
    found, about = read_file(tmp_path / name)
    assert about is None
    assert list(found) == list(tensors) or name.startswith(("hub", "no"))
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_aliases_alone_are_enough_and_differing_ones_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "detr.detr.bbox_embed.0.layers.2.bias"
    alias = name.replace("bbox_embed", "transformer.decoder.bbox_embed")
    ours = "bbox_embed.0.layers.2.bias"
    file = small_file(tmp_path / "a.pth", **{name: None, alias: torch.arange(4.0)})
    assert load_model(file).model.state_dict()[ours].tolist() == [0, 1, 2, 3]
    assert not [r for r in caplog.records if "differs" in r.message]
    file = small_file(tmp_path / "a.pth", **{alias: torch.arange(4.0)})
    assert not load_model(file).model.state_dict()[ours].any()
    assert f"`{alias}` differs from the box head that it repeats" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"detr.detr.query_embed.weight": empty((5, 63))},
            r"1 of \d+ keys of `.*a.pth` do not fit: `detr.detr.query_embed.weight` "
            r"\(5x63 there, 5x64 here\)",
        ),
        (
            {"detr.controller.layers.2.weight": None},
            r"1 of \d+ keys .*: `detr.controller.layers.2.weight` \(absent there, 169x32 here\)",
        ),
        ({"detr.detr.query_embed.weight": None}, "lacks `detr.detr.query_embed.weight`"),
        ({"detr.detr.transformer.level_embed": empty((4,))}, "tensors of impossible shapes"),
        ({"detr.detr.transformer.level_embed": empty((0, 32))}, "tensors of impossible shapes"),
        (
            {"detr.detr.backbone.0.backbone.res4.6.conv1.weight": empty((1,))},
            r"on the backbone of another kind, expected one of resnet50, resnet101, swin_l",
        ),
        (
            {"detr.detr.transformer.level_embed": None},
            "holds tensors but no pmvis model and no IDOL",
        ),
    ],
)
def test_files_that_do_not_fit_say_where(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match=message):
        load_model(small_file(tmp_path / "a.pth", **changes))


def test_strangers_in_a_file_are_reported_and_left_out(tmp_path: Path) -> None:
    extras = {ITER: torch.zeros(1), "detr.detr.backbone.0.backbone.stem.fc.bias": torch.zeros(9)}
    report = load_model(small_file(tmp_path / "a.pth", **extras)).report
    assert report.unexpected == tuple(extras)
    told, asked = [], []
    report.tell(told.append, asked.append)
    assert told[0].startswith("`")
    assert told[1].endswith(f"tensors loaded; unexpected: 2 ({', '.join(extras)})")
    assert [line.split(":")[0] for line in asked] == ["loaded", "aliased", "unexpected"]
    told.clear()
    KeyReport(loaded=("a",), aliased=("b",)).tell(told.append, asked.append)
    assert told == []


@pytest.mark.parametrize(
    ("classes", "file", "spec", "name", "assumed"),
    [
        (80, "model.pth", "", "coco", False),
        (25, "model.pth", "", "ovis", False),
        (40, "model.pth", "", "ytvis2019", True),
        (40, "idol_ytvis21_r50.pth", "", "ytvis2021", False),
        (40, "ytvis_2021_swinL/model_final.pth", "", "ytvis2021", False),
        (40, "IDOL_YTVIS19_R50.pth", "", "ytvis2019", False),
        (40, "model_0012021.pth", "", "ytvis2019", True),
        (40, "idol_ytvis19.pth", "ytvis2021", "ytvis2021", False),
    ],
)
def test_vocabularies_follow_from_counts_names_and_the_option(
    classes: int, file: str, spec: str, name: str, assumed: bool
) -> None:
    found = choose_vocabulary(classes, spec, Path("weights") / file)
    assert (found.name, found.assumed) == (name, assumed)
    assert len(found.categories) == classes


def test_what_is_wanted_decides_only_where_nothing_else_does() -> None:
    wanted = find_vocabulary("ytvis2021").categories
    assert choose_vocabulary(40, "", Path("model.pth"), wanted).categories == wanted
    assert choose_vocabulary(40, "", Path("ytvis19.pth"), wanted).name == "ytvis2019"


def test_a_class_head_of_another_size_names_the_categories_and_the_way_out(
    tmp_path: Path,
) -> None:
    file = small_file(tmp_path / "a.pth", classes=40)
    with pytest.raises(
        DataError, match=r"tells 40 categories apart, `ovis` names 25 \(Person"
    ) as e:
        load_model(file, "ovis")
    assert "`--categories ytvis2019` or `--categories ytvis2021`; to" in str(e.value.hint)
    assert "train-image --init" in str(e.value.hint)
    file = small_file(tmp_path / "b.pth", classes=3)
    with pytest.raises(DataError, match=r"3 categories.*ytvis2021 40, ovis 25\)") as e:
        load_model(file)
    assert "--categories FILE" in str(e.value.hint)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"categories": ["fox", "owl", "elk"]}))
    assert [c.name for c in load_model(file, str(names)).categories] == ["fox", "owl", "elk"]


def test_an_assumed_vocabulary_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_model(small_file(tmp_path / "a.pth", classes=40))
    assert "taken for ytvis2019 (give `--categories ytvis2021`" in caplog.text
    caplog.clear()
    load_model(small_file(tmp_path / "ytvis21.pth", classes=40))
    assert caplog.text == ""


def test_a_file_with_names_of_its_own_takes_no_others(tmp_path: Path) -> None:
    first = load_model(small_file(tmp_path / "a.pth"))
    state, config = first.model.state_dict(), first.model.config
    save_model(tmp_path / "m.safetensors", state, config, first.categories, first.tracker)
    with pytest.raises(UsageError, match=r"names 25 \(Person, Bird, Cat, …\)"):
        load_model(tmp_path / "m.safetensors", "ovis")


def test_coco_is_the_published_vocabulary(shared: Path) -> None:
    listed = json.loads((shared / "real/images/instances_train.json").read_text())["categories"]
    assert [(c.id, c.name) for c in COCO] == [(row["id"], row["name"]) for row in listed]
    assert [len(find_vocabulary(name).categories) for name in VOCABULARIES] == [80, 40, 40, 25]


def test_thresholds_are_those_of_the_data_set() -> None:
    ovis = published_thresholds("ovis", "resnet50")
    assert (ovis.short_side, ovis.mask_nms, ovis.new_score) == (720, 0.3, 0.3)
    assert published_thresholds("coco", "resnet101").short_side == 640
    assert published_thresholds("coco", "swin_l").short_side == 800
    assert published_thresholds("ytvis2021", "swin_l") == TrackerConfig()
    assert published_thresholds("mine", "swin_l") == TrackerConfig()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IMAGE_PRESETS["tiny"].model, "IDOL has no backbone `tiny`"),
        (IMAGE_PRESETS["mobilenet_v2"].model, "IDOL has no backbone `mobilenet_v2`"),
        (replace(SMALL, heads=4, points=8), "cannot express heads 4, points 8"),
    ],
)
def test_models_that_no_official_file_can_hold(config: ModelConfig, message: str) -> None:
    with torch.device("meta"):
        state = build_idol(config, 3).state_dict()
    with pytest.raises(DataError, match=message):
        to_official(state, config)


def test_the_unit_of_coordinates_goes_into_the_weights() -> None:
    torch.manual_seed(0)
    config = replace(SMALL, mask_coordinate_unit_px=24.0)
    model = build_idol(config, 3)
    for parameter in model.controller.parameters():
        torch.nn.init.normal_(parameter)
    state = model.state_dict()
    folded = from_official(to_official(state, config)).tensors
    plain = build_idol(SMALL, 3)
    plain.load_state_dict(dict(folded))
    hidden, features = torch.randn(6, 32), torch.rand(8, 5, 7)
    centres = torch.rand(6, 2) * 50
    with torch.no_grad():
        ours = dynamic_masks(features, model.controller(hidden), centres, 24.0)
        theirs = dynamic_masks(features, plain.controller(hidden), centres)
        unfolded = dynamic_masks(features, model.controller(hidden), centres)
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()
    assert (unfolded - ours).abs().max() > 1
    assert torch.equal(state["controller.layers.2.bias"], model.controller.last.bias)


ATTACK = b"cposix\nsystem\n(Vtouch exploded\ntR."


@pytest.mark.parametrize("read", [load_model, read_model, read_file])
def test_weights_that_want_to_run_code_are_refused(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pth").write_bytes(ATTACK)
    with pytest.raises(DataError, match=re.escape("`posix.system`, which no tensor needs")):
        read(tmp_path / "a.pth")
    for name in ("a.safetensors", "model.safetensors"):
        (tmp_path / name).write_bytes(ATTACK)
        with pytest.raises(PmvisError, match="not a safetensors file"):
            read(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_environment_variables_of_torch_do_not_open_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "a.pth").write_bytes(ATTACK)
    with pytest.raises(DataError):
        load_model(tmp_path / "a.pth")
    assert not (tmp_path / "exploded").exists()
