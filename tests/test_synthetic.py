"""The micro-benchmark: its formats, its masks, its seed, and that it moves as it should."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from pmvis_core import masks
from pmvis_core.errors import UsageError
from pmvis_core.formats.voc import read_voc
from pmvis_core.formats.ytvis import read_dataset
from pmvis_core.synthetic import benchmark as synthetic
from pmvis_core.synthetic.benchmark import CATEGORIES, SynthConfig
from pmvis_core.synthetic.scenes import draw_clip, draw_still
from pmvis_core.synthetic.shapes import (
    BOX_CATEGORIES,
    MASK_CATEGORIES,
    OCCLUDER,
    STRANGERS,
    UNIT,
    Pose,
    coverage,
    full_area,
    plain_look,
    random_look,
    render_look,
    visible_masks,
)

SMALL = SynthConfig(mask_stills=8, box_stills=9, val_stills=3, train_videos=3, valid_videos=4)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth") / "set"
    synthetic.draw(folder, 5, SMALL)
    return folder


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_same_bytes_and_other_seed_other_bytes(drawn, tmp_path):
    synthetic.draw(tmp_path / "again", 5, SMALL)
    synthetic.draw(tmp_path / "other", 6, SMALL)
    assert _digests(tmp_path / "again") == _digests(drawn)
    assert _digests(tmp_path / "other") != _digests(drawn)


def test_enlarging_one_part_changes_no_other(drawn, tmp_path):
    more = SynthConfig(mask_stills=9, box_stills=9, val_stills=3, train_videos=4, valid_videos=4)
    synthetic.draw(tmp_path / "more", 5, more)
    before, after = _digests(drawn), _digests(tmp_path / "more")
    images = {name for name in before if name.endswith(".jpg")}
    assert all(before[name] == after[name] for name in images)


def test_mask_stills_are_a_coco_data_set(drawn):
    coco = COCO(str(drawn / "coco" / "instances_train.json"))
    assert {c["name"] for c in coco.dataset["categories"]} == set(MASK_CATEGORIES)
    assert len(coco.imgs) == SMALL.mask_stills
    for annotation in coco.anns.values():
        assert coco_mask.area(annotation["segmentation"]) == annotation["area"]
        assert coco_mask.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"]
    for image in coco.imgs.values():
        pixels = cv2.imread(str(drawn / "coco" / "train" / image["file_name"]))
        assert pixels.shape == (SMALL.height, SMALL.width, 3)


def test_box_stills_are_imagenet_xml_with_images(drawn):
    data = read_voc(drawn / "imagenet" / "Annotations")
    assert len(data.images) == SMALL.box_stills
    assert {c.name for c in data.categories} <= set(synthetic.WNIDS.values())
    for image in data.images:
        assert (drawn / "imagenet" / "images" / f"{image.file_name}.jpg").is_file()
    for annotation in data.annotations:
        x, y, width, height = annotation.bbox
        assert 0 <= x and 0 <= y and x + width <= SMALL.width and y + height <= SMALL.height


def test_voc_boxes_come_back_as_the_mask_boxes(drawn):
    names = {wnid: name for name, wnid in synthetic.WNIDS.items()}
    data = read_voc(drawn / "imagenet" / "Annotations")
    image = data.images[0]
    number = int(image.file_name.rsplit("_", 1)[1]) - 1
    rng = np.random.default_rng([5, 0, number])
    still = draw_still(rng, SMALL, BOX_CATEGORIES)
    boxes = [masks.to_box(masks.encode(mask)) for mask in still.masks]
    rows = [row for row in data.annotations if row.image_id == image.id]
    wnids = {c.id: c.name for c in data.categories}
    assert [names[wnids[row.category_id]] for row in rows] == still.names
    for row, (x1, y1, x2, y2) in zip(rows, boxes, strict=True):
        assert row.bbox == (x1, y1, x2 - x1, y2 - y1)


def test_no_image_of_a_box_category_has_a_mask_and_the_reverse(drawn):
    text = (drawn / "coco" / "instances_train.json").read_text()
    assert not any(name in text for name in BOX_CATEGORIES)
    assert not list((drawn / "imagenet").rglob("*.json"))


def test_training_videos_carry_no_labels_and_truth_lies_apart(drawn):
    bare = json.loads((drawn / "videos" / "train.json").read_text())
    assert set(bare) == {"videos", "categories"}
    truth = read_dataset(drawn / "videos" / "train_truth.json")
    assert [v.id for v in truth.videos] == [v["id"] for v in bare["videos"]]
    assert {v.video_id for v in truth.annotations} == {v.id for v in truth.videos}


def test_held_out_videos_read_back_with_exact_boxes_and_areas(drawn):
    data = json.loads((drawn / "videos" / "valid.json").read_text())
    for row in data["annotations"]:
        for rle, box, area in zip(row["segmentations"], row["bboxes"], row["areas"], strict=True):
            assert (rle is None) == (box is None) == (area is None)
            if rle is not None:
                x1, y1, x2, y2 = masks.to_box(rle)
                assert box == [x1, y1, x2 - x1, y2 - y1]
                assert masks.area(rle) == area >= SMALL.visible_pixels
    assert len(read_dataset(drawn / "videos" / "valid.json").videos) == SMALL.valid_videos
    for video in data["videos"]:
        for name in video["file_names"]:
            assert (drawn / "videos" / "valid" / "JPEGImages" / name).is_file()


def test_target_names_every_source(drawn):
    target = json.loads((drawn / "target.json").read_text())
    names = {c["name"] for c in target["categories"]}
    assert set(target["coco"].values()) | set(target["imagenet"].values()) == names
    assert [c["name"] for c in target["categories"]] == list(CATEGORIES)


def test_no_path_or_time_is_written(drawn):
    for path in drawn.glob("**/*.json"):
        assert str(drawn) not in path.read_text()


@pytest.mark.parametrize("category", [*CATEGORIES, *STRANGERS, OCCLUDER])
def test_sprites_do_not_touch_their_border(category):
    alpha = coverage(category)
    edge = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
    assert edge.max() == 0.0
    assert (0.1 if category == OCCLUDER else 0.2) < alpha.sum() / (np.pi * UNIT**2) < 1.1


def test_strangers_hide_the_same_objects_and_are_none(tmp_path):
    crowded = replace(SMALL, strangers=2.0)
    hidden = 0
    for seed in range(8):
        plain, full = (
            draw_clip(np.random.default_rng(seed), config, CATEGORIES)
            for config in (SMALL, crowded)
        )
        assert full.names == plain.names
        for before, after in zip(plain.masks, full.masks, strict=True):
            for a, b in zip(before, after, strict=True):
                assert b is None or (a is not None and not (b & ~a).any())
                hidden += a is not None and (b is None or bool((a & ~b).any()))
        pairs = zip(plain.frames, full.frames, strict=True)
        assert any((a != b).any() for a, b in pairs)
    assert hidden >= 20


def test_strangers_change_the_videos_only(drawn, tmp_path):
    synthetic.draw(tmp_path / "crowded", 5, replace(SMALL, strangers=2.0))
    before, after = _digests(drawn), _digests(tmp_path / "crowded")
    same = {name for name in before if before[name] == after[name]}
    assert {name for name in before if name.startswith(("coco", "imagenet", "stills"))} <= same
    assert not any(name.endswith(".jpg") for name in same if name.startswith("videos/valid/"))
    assert "strangers" not in (drawn / synthetic.STAMP).read_text()
    assert json.loads((tmp_path / "crowded" / synthetic.STAMP).read_text())["config"]["strangers"]
    with pytest.raises(UsageError, match="strangers"):
        SynthConfig(strangers=6.0)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_shape_covers_what_its_area_says_at_every_angle_and_size(category):
    for radius, angle, aspect in ((20.0, 0.0, 1.0), (14.0, 0.7, 0.8), (30.0, -0.4, 1.2)):
        pose = Pose(64.0, 60.0, radius, angle, aspect)
        (mask,) = visible_masks([category], [pose], 120, 128)
        assert mask.sum() == pytest.approx(full_area(category, pose), rel=0.06)


def test_ring_has_a_hole_and_disc_has_not():
    pose = Pose(50.0, 50.0, 20.0, 0.0, 1.0)
    ring, disc = (visible_masks([name], [pose], 100, 100)[0] for name in ("ring", "disc"))
    assert not ring[50, 50]
    assert disc[50, 50]


def test_a_later_shape_hides_an_earlier_one():
    pose = Pose(40.0, 40.0, 15.0, 0.0, 1.0)
    behind, front = visible_masks(["disc", "square"], [pose, pose], 80, 80)
    assert not (behind & front).any()
    assert front.sum() == visible_masks(["square"], [pose], 80, 80)[0].sum()


def test_shapes_outside_the_frame_are_absent():
    for x, y in ((-60.0, 40.0), (40.0, -60.0), (300.0, 40.0), (40.0, 300.0)):
        (mask,) = visible_masks(["disc"], [Pose(x, y, 20.0, 0.0, 1.0)], 80, 80)
        assert not mask.any()


def test_masks_lie_where_the_picture_changes():
    """The painted object and its mask agree: inside differs from the background, outside not."""
    quiet = SynthConfig(noise=0.0, still_objects=(1, 1), contrast=0.0, clutter=(0, 0))
    for seed in range(5):
        still = draw_still(np.random.default_rng(seed), quiet, ["square"])
        mask = still.masks[0]
        inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        colours = still.image[inner].reshape(-1, 3).astype(int)
        assert (colours.max(axis=0) - colours.min(axis=0)).max() <= 1


def test_stills_show_enough_of_each_object():
    for seed in range(20):
        still = draw_still(np.random.default_rng(seed), SMALL, CATEGORIES)
        assert 1 <= len(still.names) <= 3
        smallest = np.pi * SMALL.still_radius[0] ** 2 * 0.2 * SMALL.visible_share
        assert all(mask.sum() >= smallest for mask in still.masks)


def test_videos_have_entry_exit_motion_and_occlusion():
    entries = exits = moves = hidden = 0
    for seed in range(60):
        clip = draw_clip(np.random.default_rng([1, seed]), SMALL, CATEGORIES)
        for row in clip.masks:
            shown = [mask is not None for mask in row]
            entries += not shown[0] and any(shown)
            exits += not shown[-1] and any(shown)
            if shown[0] and shown[-1]:
                centres = [np.argwhere(mask).mean(axis=0) for mask in (row[0], row[-1])]
                moves += float(np.linalg.norm(centres[0] - centres[1])) > 5.0
        full = [clip.masks[i][5] for i in range(len(clip.names))]
        for i, first in enumerate(full):
            for second in full[i + 1 :]:
                if first is not None and second is not None:
                    grown = cv2.dilate(second.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
                    hidden += bool((grown & first).any())
    assert entries >= 5
    assert exits >= 5
    assert moves >= 30
    assert hidden >= 5


def test_masks_of_one_frame_never_overlap():
    clip = draw_clip(np.random.default_rng(3), SMALL, CATEGORIES)
    for t in range(SMALL.frames):
        total = sum(row[t].astype(int) for row in clip.masks if row[t] is not None)
        assert np.max(total) <= 1


def test_gap_zero_is_the_look_of_the_stills_and_a_gap_darkens_and_blurs():
    rng = np.random.default_rng(0)
    look = random_look(rng, 0.0, 3.0)
    assert (look.gamma, look.gains, look.blur, look.streak) == (1.0, (1.0, 1.0, 1.0), 0.0, 1.0)
    frame = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert np.array_equal(render_look(rng, frame, plain_look(0.0)), frame)
    far = [render_look(rng, frame, random_look(rng, 2.0, 0.0)).astype(float) for _ in range(20)]
    assert np.mean([picture.mean() for picture in far]) < frame.mean() - 20
    assert np.mean([picture.std() for picture in far]) < frame.std()


def test_an_existing_benchmark_is_kept_unless_told(drawn, tmp_path):
    tiny = SynthConfig(mask_stills=1, box_stills=1, val_stills=0, train_videos=0, valid_videos=0)
    folder = tmp_path / "set"
    synthetic.draw(folder, 0, tiny)
    with pytest.raises(UsageError, match="holds a benchmark already"):
        synthetic.draw(folder, 1, tiny)
    synthetic.draw(folder, 1, tiny, overwrite=True)
    assert json.loads((folder / synthetic.STAMP).read_text())["seed"] == 1
    assert not (tmp_path / "set.part").exists()


def test_a_foreign_folder_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(UsageError, match="no benchmark"):
        synthetic.draw(tmp_path / "thesis", 0, SMALL, overwrite=True)
    (tmp_path / "thesis").rename(tmp_path / "set.part")
    with pytest.raises(UsageError, match="no benchmark"):
        synthetic.draw(tmp_path / "set", 0, SMALL)
    assert (tmp_path / "set.part" / "chapter.tex").exists()


def test_an_interrupted_run_leaves_no_folder_and_can_be_repeated(tmp_path):
    tiny = SynthConfig(mask_stills=2, box_stills=1, val_stills=1, train_videos=1, valid_videos=1)

    def interrupted(items, what, total=None):
        if what == "valid videos":
            raise KeyboardInterrupt
        return iter(items)

    with pytest.raises(KeyboardInterrupt):
        synthetic.draw(tmp_path / "set", 0, tiny, interrupted)
    assert not (tmp_path / "set").exists()
    assert (tmp_path / "set.part").is_dir()
    synthetic.draw(tmp_path / "set", 0, tiny)
    assert not (tmp_path / "set.part").exists()
    assert (tmp_path / "set" / "videos" / "valid.json").is_file()


@pytest.mark.parametrize("wrong", [{"gap": -1.0}, {"frames": 0}, {"train_videos": -1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UsageError):
        SynthConfig(**wrong)


def test_objects_too_large_for_the_frame_are_refused(tmp_path):
    config = SynthConfig(height=16, width=16, still_radius=(200.0, 220.0), mask_stills=1)
    with pytest.raises(UsageError, match="no object"):
        synthetic.draw(tmp_path / "set", 0, config)
