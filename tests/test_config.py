"""Settings: their TOML form, their layers, and what a typing error says."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmvis_core.config import (
    ModelConfig,
    TrainConfig,
    environment_settings,
    layer,
    override,
    parse_settings,
    read_toml,
    to_toml,
)
from pmvis_core.errors import DataError, UsageError
from pmvis_core.systems.pmvis import RunConfig
from pmvis_core.systems.presets import IMAGE_PRESETS, VIDEO_PRESETS, find_preset

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.mark.parametrize("presets", [IMAGE_PRESETS, VIDEO_PRESETS])
def test_every_preset_survives_its_toml(presets: dict[str, RunConfig], tmp_path: Path) -> None:
    for preset in presets.values():
        file = tmp_path / "config.toml"
        file.write_text(to_toml(preset))
        assert override(RunConfig(), read_toml(file), "file") == preset


@given(st.floats(0, 1e3), st.integers(0, 10**6), st.text(max_size=8), st.lists(st.integers(0, 99)))
def test_values_survive_toml(rate: float, steps: int, name: str, milestones: list[int]) -> None:
    config = TrainConfig(
        learning_rate=rate, steps=steps, schedule=name, milestones=tuple(milestones)
    )
    assert override(TrainConfig(), tomllib.loads(to_toml(config)), "x") == config


def test_later_layers_win_and_are_remembered() -> None:
    config, origins = layer(
        RunConfig(),
        [
            ("file", {"train": {"steps": 5, "learning_rate": 1}}),
            ("command line", parse_settings(["train.steps=7", "model.backbone=tiny"])),
        ],
    )
    assert (config.train.steps, config.train.learning_rate) == (7, 1.0)
    assert config.model.backbone == "tiny"
    assert origins["train.steps"] == "command line"
    assert origins["train.learning_rate"] == "file"
    assert "steps = 7  # command line" in to_toml(config, origins)


def test_the_environment_is_a_layer() -> None:
    found = environment_settings(RunConfig(), {"PMVIS_TRAIN_STEPS": "9", "PMVIS_OTHER": "1"})
    assert found == {"train.steps": 9}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"queris": 3}, "no setting `queris`"),
        ({"queries": "many"}, "is 'many', expected int"),
        ({"dropout": True}, "is True, expected float"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        override(ModelConfig(), values, "here")


def test_a_setting_needs_a_value() -> None:
    with pytest.raises(UsageError, match="has no `=`"):
        parse_settings(["train.steps"])


def test_presets_are_found_by_either_spelling_and_near_misses_are_suggested() -> None:
    assert find_preset(IMAGE_PRESETS, "swin-l") is IMAGE_PRESETS["swin_l"]
    with pytest.raises(UsageError) as caught:
        find_preset(IMAGE_PRESETS, "resnet5")
    assert caught.value.hint == "did you mean `resnet50`?"


def test_broken_toml_is_bad_data(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("a = = 1")
    with pytest.raises(DataError, match="is not valid TOML"):
        read_toml(tmp_path / "x.toml")


def test_published_numbers_are_the_defaults() -> None:
    preset = IMAGE_PRESETS["resnet50"]
    assert preset == replace(preset, model=ModelConfig(), train=TrainConfig())


PUBLISHED = [
    # name, image stage's steps, pairs, falls, video stage's, shortest, cap, rows at test
    ("resnet50", (59200, 32, (22200, 44400)), (12000, 32, (8000,)), 320, 768, 480),
    ("resnet50-coco", (59200, 32, (22200, 44400)), (12000, 32, (8000,)), 320, 768, 640),
    ("swin-l-coco", (148000, 16, (59200, 118400)), (12000, 32, (8000,)), 320, 768, 800),
    ("resnet101-ytvis2019", (12000, 32, (8000,)), (12000, 32, (8000,)), 320, 768, 480),
    ("swin-l-ytvis2021", (12000, 32, (8000,)), (12000, 32, (8000,)), 320, 768, 480),
    ("resnet50-ovis", (12000, 16, (8000,)), (12000, 16, (8000,)), 480, 1333, 720),
    ("resnet50-ytvis2019-code", (50000, 4, (8000,)), (50000, 4, (8000,)), 320, 768, 480),
    ("swin-l-ytvis2019-code", (50000, 4, (32000,)), (50000, 4, (8000,)), 320, 768, 480),
    ("swin-l-ovis-code", (12000, 4, (8000,)), (50000, 4, (8000,)), 480, 1333, 720),
]


@pytest.mark.parametrize("name, image, video, shortest, cap, rows", PUBLISHED)
def test_presets_have_the_published_numbers(
    name: str,
    image: tuple[int, int, tuple[int, ...]],
    video: tuple[int, int, tuple[int, ...]],
    shortest: int,
    cap: int,
    rows: int,
) -> None:
    stages = find_preset(IMAGE_PRESETS, name), find_preset(VIDEO_PRESETS, name)
    for stage, numbers in zip(stages, (image, video), strict=True):
        train = stage.train
        assert (train.steps, train.pairs_per_batch, train.milestones) == numbers
        assert train.learning_rate == (2e-4 if train.steps > 50000 else 1e-4)
        assert (train.clip_norm, train.pairwise_warmup_steps) == (0.01, 10000)
        assert (train.box_only_share, train.pseudo_mask_factor) == (3 / 7, 0.5)
        assert stage.augment.crop_range == (384, 600)
        assert stage.tracker.short_side == rows
        assert stage.tracker.mask_nms == stage.tracker.new_score + (0.0 if rows == 720 else 0.3)
        assert name.replace("-", "_").startswith(stage.model.backbone)
    assert stages[0].augment.max_size == 1333
    assert (stages[1].augment.min_sizes[0], stages[1].augment.max_size) == (shortest, cap)


def test_both_stages_know_the_same_presets() -> None:
    assert list(IMAGE_PRESETS) == list(VIDEO_PRESETS)
    assert all(preset.preset == name for name, preset in VIDEO_PRESETS.items())


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"hidden_dim": 32, "heads": 6}, "`model.hidden_dim` is 32 with `model.heads` = 6"),
        ({"hidden_dim": 36, "heads": 4}, "expected a multiple of 8 and of the heads"),
        ({"queries": 30, "query_grid": (5, 7)}, "`model.query_grid` is [5, 7]"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        ModelConfig(**sizes).check()
    ModelConfig().check()
