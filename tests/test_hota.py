"""HOTA against its definition, against numbers of TrackEval, and against TrackEval where it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pmvis_core import masks
from pmvis_core.errors import DataError, UsageError
from pmvis_core.evaluation.hota import (
    CURVES,
    RULES,
    Hota,
    HotaScores,
    alphas,
    hota,
    hota_metrics,
    hota_table,
)
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.formats.ytvis_annotation import Annotation
from pmvis_core.types import Category, VideoInfo

HEIGHT, WIDTH, FRAMES = 24, 32, 7
CATEGORIES = (Category(1, "car"), Category(2, "pedestrian"))
VIDEOS = tuple(VideoInfo(n, f"{n:04d}", HEIGHT, WIDTH, FRAMES) for n in (1, 2, 3))
IGNORED = 10000


def drawn(seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (T, H, W) values `1000 class + object` of truth and predictions of each video.

    Rectangles that move; truths and predictions come and go, one is found under another category,
    one changes its identity, one is invented inside the region to ignore, which is 10000.
    """
    rng = np.random.default_rng(seed)
    for _ in VIDEOS:
        truth = np.zeros((FRAMES, HEIGHT, WIDTH), np.uint16)
        found = np.zeros_like(truth)
        start, step = rng.integers(2, 20, (4, 2)), rng.integers(-2, 3, (4, 2))
        size, kind = rng.integers(5, 10, (4, 2)), rng.integers(1, 3, 4)
        for t in range(FRAMES):
            if t != 3:
                truth[t, 2:14, 16:31] = IGNORED
            for k in range(4):
                value = kind[k] * 1000 + k + 1
                corner = start[k] + step[k] * t
                if rng.random() < 0.9:
                    paint(truth[t], corner, size[k], value)
                if k == 1 and t > 3:
                    value = kind[k] * 1000 + 9
                if k == 2 and seed % 2:
                    value = (3 - kind[k]) * 1000 + 3
                if rng.random() < 0.85:
                    paint(found[t], corner + rng.integers(-1, 3, 2), size[k], value)
            if rng.random() < 0.8:
                found[t, 4:9, 18:26] = kind[0] * 1000 + 77
        yield truth, found


def paint(canvas: np.ndarray, corner: Any, size: Any, value: int) -> None:
    """Fill a rectangle."""
    (y, x), (h, w) = np.maximum(corner, 0), np.maximum(size + np.minimum(corner, 0), 0)
    canvas[y : y + h, x : x + w] = value


def scene(seed: int) -> tuple[Dataset, tuple[Annotation, ...]]:
    """Return `drawn` as a data set and predictions."""
    truths: list[Annotation] = []
    found: list[Annotation] = []
    for video, (truth, prediction) in zip(VIDEOS, drawn(seed), strict=True):
        for value in np.unique(truth)[1:].tolist():
            for category in [1, 2] if value == IGNORED else [value // 1000]:
                row = track(truth == value, len(truths) + 1, video.id, category)
                truths.append(replace(row, iscrowd=value == IGNORED))
        for value in np.unique(prediction)[1:].tolist():
            row = track(prediction == value, len(found) + 1, video.id, value // 1000)
            found.append(replace(row, score=1.0))
    return Dataset("truth", CATEGORIES, VIDEOS, tuple(truths)), tuple(found)


def track(pixels: np.ndarray, number: int, video_id: int = 1, category_id: int = 1) -> Annotation:
    """Return (T, H, W) pixels as an annotation, absent where there are none."""
    rles = tuple(masks.encode(frame) if frame.any() else None for frame in pixels)
    areas = tuple(None if rle is None else masks.area(rle) for rle in rles)
    return Annotation(number, video_id, category_id, rles, areas, areas=areas)


COLUMNS = ("HOTA", "DetA", "AssA", "DetRe", "AssPr", "HOTALocA(0)")
# Means over the alphas on `scene(seed)` by TrackEval 1.3.0: its YouTubeVIS, DAVIS and KittiMOTS
# classes with the HOTA metric, run by `by_trackeval` below; `mean` is its cls_comb_cls_av.
GOLDEN = """
ytvis 0 car 0.2566359397 0.2058080375 0.3431846269 0.3076023392 0.4314703218 0.2418018436
ytvis 0 pedestrian 0.3107024386 0.2485323538 0.3945589607 0.2999006951 0.5841514010 0.3090806930
ytvis 0 mean 0.2836691892 0.2271701956 0.3688717938 0.3037515172 0.5078108614 0.2754412683
ytvis 0 all 0.2843794298 0.2251627818 0.3722341157 0.3034371643 0.5194770034 0.2727597041
ytvis 1 car 0.1252740823 0.0777062947 0.2041838227 0.0881578947 0.4316833751 0.1261507456
ytvis 1 pedestrian 0.3081953845 0.2555748916 0.3922511258 0.3755980861 0.5217169515 0.2901447800
ytvis 1 mean 0.2167347334 0.1666405931 0.2982174742 0.2318779904 0.4767001633 0.2081477628
ytvis 1 all 0.2650875106 0.1983568596 0.3740227010 0.2671300894 0.5208880484 0.2461816089
davis 0 all 0.3185619774 0.2860528329 0.3646518267 0.4617996604 0.5086451995 0.3177822187
davis 1 all 0.3497423488 0.3237428081 0.3933475693 0.4751879699 0.5363472083 0.3419298345
mots 0 car 0.3074864747 0.2620502510 0.3731924260 0.4288499025 0.4636753529 0.3068308135
mots 0 pedestrian 0.3668119134 0.3477595910 0.3945589607 0.4541353383 0.5841514010 0.3721824397
mots 1 car 0.1613681022 0.1290694390 0.2041838227 0.1602870813 0.4316833751 0.1641078992
mots 1 pedestrian 0.3406544561 0.2997759338 0.4001368609 0.4583333333 0.5387519508 0.3352803341
"""


@pytest.mark.parametrize("line", GOLDEN.strip().splitlines())
def test_numbers_of_trackeval(line: str) -> None:
    rules, seed, name, *numbers = line.split()
    summary = named(hota(*scene(int(seed)), rules=rules))[name].summary
    values = [summary[column] for column in COLUMNS]
    assert values == pytest.approx([float(number) for number in numbers], abs=6e-11)


def named(found: Hota) -> dict[str, HotaScores]:
    """Return the numbers of each category, of all matches and, if there are several, the mean."""
    if len(found.categories) == 1:
        return {"all": found.combined}
    categories = {c.name: found.of_category(c.id) for c in found.categories}
    return {**categories, "mean": found.class_averaged(), "all": found.combined}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rules", RULES)
def test_against_trackeval_itself(rules: str, seed: int, tmp_path: Path) -> None:
    pytest.importorskip("trackeval", reason="TrackEval is not installed")
    expected = by_trackeval(rules, seed, tmp_path)
    ours = named(hota(*scene(seed), rules=rules))
    assert expected
    for key, golden in expected.items():
        name = {"cls_comb_cls_av": "mean", "cls_comb_det_av": "all", "general": "all"}.get(key, key)
        for curve in CURVES:
            np.testing.assert_allclose(ours[name].curves[curve], golden[curve], atol=1e-12)
        for count in ("tp", "fn", "fp"):
            np.testing.assert_array_equal(ours[name].counts[count], golden[f"HOTA_{count.upper()}"])
        summary = ours[name].summary
        for column in ("HOTA(0)", "LocA(0)", "HOTALocA(0)"):
            assert summary[column] == pytest.approx(golden[column], abs=1e-12)


def by_trackeval(rules: str, seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Return what TrackEval makes of `drawn`, written as its own formats."""
    import trackeval

    places = {"GT_FOLDER": f"{folder}/gt/", "TRACKERS_FOLDER": f"{folder}/found/"}
    config = {**places, "PRINT_CONFIG": False}
    if rules == "ytvis":
        write_ytvis(seed, folder)
        data = trackeval.datasets.YouTubeVIS({**config, "SPLIT_TO_EVAL": "x"})
    elif rules == "davis":
        write_pngs(seed, folder)
        data = trackeval.datasets.DAVIS(config)
    else:
        write_lines(seed, folder)
        lengths = {video.name: FRAMES for video in VIDEOS}
        places = {"SEQ_INFO": lengths, "GT_LOC_FORMAT": "{gt_folder}/{seq}.txt"}
        data = trackeval.datasets.KittiMOTS({**config, **places})
    quiet = ("PRINT_RESULTS", "PRINT_CONFIG", "TIME_PROGRESS", "OUTPUT_SUMMARY")
    quiet = dict.fromkeys([*quiet, "OUTPUT_DETAILED", "PLOT_CURVES"], False)
    evaluator = trackeval.Evaluator({**quiet, "LOG_ON_ERROR": None})
    results, _ = evaluator.evaluate([data], [trackeval.metrics.HOTA()])
    (of_data,) = results.values()
    return {name: one["HOTA"] for name, one in of_data["a"]["COMBINED_SEQ"].items()}


def write_ytvis(seed: int, folder: Path) -> None:
    """Write `scene` as TrackEval reads YouTube-VIS: ground truth as plain runs."""
    truth, found = scene(seed)
    videos = [
        {"id": v.id, "file_names": [f"{v.name}/{t}.jpg" for t in range(FRAMES)]} for v in VIDEOS
    ]
    document = {
        "videos": videos,
        "categories": [{"id": c.id, "name": c.name} for c in CATEGORIES],
        "annotations": [
            {
                "id": row.id,
                "video_id": row.video_id,
                "category_id": row.category_id,
                "iscrowd": int(row.iscrowd),
                "height": HEIGHT,
                "width": WIDTH,
                "areas": row.areas,
                "segmentations": [None if rle is None else plain(rle) for rle in row.rles],
            }
            for row in truth.annotations
        ],
    }
    results = [
        {
            "video_id": row.video_id,
            "category_id": row.category_id,
            "score": row.score,
            "segmentations": row.rles,
        }
        for row in found
    ]
    for place, content in (
        ("gt/youtube_vis_x", document),
        ("found/youtube_vis_x/a/data", results),
    ):
        (folder / place).mkdir(parents=True)
        (folder / place / "x.json").write_text(json.dumps(content))


def plain(rle: Any) -> dict[str, Any]:
    """Return an RLE with its runs as numbers."""
    pixels = masks.decode(rle).ravel(order="F")
    edges = [0, *(np.flatnonzero(np.diff(pixels)) + 1).tolist(), pixels.size]
    runs = np.diff(edges).tolist()
    return {"size": rle["size"], "counts": [0, *runs] if pixels[0] else runs}


def write_pngs(seed: int, folder: Path) -> None:
    """Write `drawn` as DAVIS folders."""
    from PIL import Image

    for video, pair in zip(VIDEOS, drawn(seed), strict=True):
        for place, values in zip(("gt", "found/a/data"), pair, strict=True):
            (folder / place / video.name).mkdir(parents=True)
            for t, frame in enumerate(values):
                image = np.where(frame == IGNORED, 255, frame % 1000 + frame // 1000 * 100)
                path = folder / place / video.name / f"{t:05d}.png"
                Image.fromarray(image.astype(np.uint8)).save(path)


def write_lines(seed: int, folder: Path) -> None:
    """Write `drawn` as MOTS texts."""
    for video, pair in zip(VIDEOS, drawn(seed), strict=True):
        for place, values in zip(("gt", "found/a/data"), pair, strict=True):
            (folder / place).mkdir(parents=True, exist_ok=True)
            lines = [
                f"{t} {value} {value // 1000} {HEIGHT} {WIDTH} {masks.encode(f == value)['counts']}"
                for t, f in enumerate(values)
                for value in np.unique(f).tolist()
                if value
            ]
            (folder / place / f"{video.name}.txt").write_text("\n".join(lines) + "\n")


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_against_the_definition(seed: int) -> None:
    """One video of dense masks; every one-to-one matching is tried in every frame."""
    rng = np.random.default_rng(seed)
    g, d, shape = rng.integers(1, 4), rng.integers(1, 4), (5, 8, 9)
    truths = np.array([blocks(rng, shape) for _ in range(g)])
    found = np.array([blocks(rng, shape) for _ in range(d)])
    video = VideoInfo(1, "v", *shape[1:], shape[0])
    scores = hota(
        Dataset("truth", CATEGORIES[:1], (video,), tuple(map(track, truths, range(1, g + 1)))),
        list(map(track, found, range(1, d + 1))),
    ).combined
    matches = best_matches(truths, found)
    for a, alpha in enumerate(alphas()):
        expected = by_definition(truths, found, [m for m in matches if m[3] >= alpha - 2e-16])
        for name, value in expected.items():
            assert scores.curves[name][a] == pytest.approx(value, abs=1e-12), (name, alpha)


def blocks(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Draw a track: a rectangle that jitters and is absent at times."""
    pixels = np.zeros(shape, bool)
    y, x = rng.integers(0, 3, 2)
    for frame in pixels:
        if rng.random() < 0.8:
            top, left = y + rng.integers(0, 3), x + rng.integers(0, 3)
            frame[top : top + rng.integers(2, 5), left : left + rng.integers(2, 5)] = True
    return pixels


def dense_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return the IoU of two masks."""
    return (a & b).sum() / union if (union := (a | b).sum()) else 0.0


def best_matches(truths: np.ndarray, found: np.ndarray) -> list[tuple[int, int, int, float]]:
    """Return (frame, truth, prediction, IoU) of the matching with the highest total score."""
    frames = range(truths.shape[1])
    iou = np.array([[[dense_iou(a[t], b[t]) for b in found] for a in truths] for t in frames])
    # Soft Jaccard index of two tracks: in each frame IoU over all the IoU that either has.
    alignment = np.zeros(iou.shape[1:])
    for i, j in np.ndindex(*alignment.shape):
        soft = sum(f[i, j] / (f[i].sum() + f[:, j].sum() - f[i, j]) for f in iou if f[i, j] > 0)
        frames_of_both = truths[i].any((1, 2)).sum() + found[j].any((1, 2)).sum()
        alignment[i, j] = soft / (frames_of_both - soft) if frames_of_both else 0
    matches = []
    for t in frames:
        score = iou[t] * alignment
        rows, columns = [i for i in range(len(truths))], list(range(len(found)))
        small = min(len(rows), len(columns))
        pairings = {
            tuple(sorted(zip(r, c, strict=True)))
            for r in permutations(rows, small)
            for c in permutations(columns, small)
        }
        ranked = sorted(pairings, key=lambda p: -sum(score[i, j] for i, j in p))
        useful = [tuple((i, j) for i, j in p if score[i, j] > 0) for p in ranked]
        total = [sum(score[i, j] for i, j in p) for p in useful]
        # Where two different matchings are equally good, either would be right.
        rivals = {p for p, s in zip(useful, total, strict=True) if s > total[0] - 1e-9}
        assume(len(rivals) == 1)
        matches += [(t, i, j, iou[t][i, j]) for i, j in useful[0]]
    return matches


def by_definition(
    truths: np.ndarray, found: np.ndarray, hits: list[tuple[int, int, int, float]]
) -> dict[str, float]:
    """Return the numbers of the matches that count."""
    there, ours = truths.any((2, 3)), found.any((2, 3))
    tp, fn, fp = len(hits), there.sum() - len(hits), ours.sum() - len(hits)
    shares = {"AssA": [], "AssRe": [], "AssPr": []}
    for _, i, j, _ in hits:
        tpa = sum(1 for hit in hits if hit[1:3] == (i, j))
        fna, fpa = there[i].sum() - tpa, ours[j].sum() - tpa
        shares["AssA"].append(tpa / (tpa + fna + fpa))
        shares["AssRe"].append(tpa / (tpa + fna))
        shares["AssPr"].append(tpa / (tpa + fpa))
    values = {name: float(np.mean(share)) if hits else 0.0 for name, share in shares.items()}
    values["DetA"] = tp / max(1, tp + fn + fp)
    values["DetRe"], values["DetPr"] = tp / max(1, tp + fn), tp / max(1, tp + fp)
    values["LocA"] = float(np.mean([hit[3] for hit in hits])) if hits else 1.0
    values["HOTA"] = float(np.sqrt(values["DetA"] * values["AssA"]))
    values["OWTA"] = float(np.sqrt(values["DetRe"] * values["AssA"]))
    return values


def boxes(*frames: tuple[int, int, int, int] | None) -> np.ndarray:
    """Return (T, H, W) pixels of a box (y, x, y, x) in each frame."""
    pixels = np.zeros((FRAMES, HEIGHT, WIDTH), bool)
    for frame, box in zip(pixels, frames, strict=False):
        if box is not None:
            frame[box[0] : box[2], box[1] : box[3]] = True
    return pixels


BOX = (0, 0, 4, 4)


def dataset(*rows: Annotation, **changes: Any) -> Dataset:
    """Return a ground truth."""
    return replace(Dataset("truth", CATEGORIES, VIDEOS, rows), **changes)


def test_a_switched_identity_halves_the_association() -> None:
    truth = dataset(track(boxes(BOX, BOX), 1))
    found = [track(boxes(BOX), 1), track(boxes(None, BOX), 2)]
    summary = hota(truth, found).combined.summary
    assert (summary["DetA"], summary["AssA"]) == (1.0, 0.5)
    assert (summary["AssRe"], summary["AssPr"], summary["LocA"]) == (0.5, 1.0, 1.0)
    assert summary["HOTA"] == pytest.approx(0.5**0.5)


def test_duplicates_cost_detections_and_a_threshold_removes_them() -> None:
    truth = dataset(track(boxes(BOX), 1))
    found = [replace(track(boxes(BOX), n), score=n / 4) for n in (1, 2, 3)]
    assert hota(truth, found).combined.summary["DetA"] == pytest.approx(1 / 3)
    assert hota(truth, found, score_threshold=0.75).combined.summary["HOTA"] == 1.0
    assert hota(truth, found, score_threshold=0.76).combined.summary["HOTA"] == 0.0
    unscored = [track(boxes(BOX), 1)]
    assert hota(truth, unscored, score_threshold=1.0).combined.summary["HOTA"] == 1.0


def test_nothing_matched_is_zero_but_for_the_localisation() -> None:
    elsewhere = [track(boxes((8, 8, 9, 9)), 1)]
    for rows, found in (((), ()), ((track(boxes(BOX), 1),), ()), ((), elsewhere)):
        scores = hota(dataset(*rows), found).combined
        assert scores.summary == {
            **dict.fromkeys(scores.summary, 0.0),
            "LocA": 1.0,
            "LocA(0)": 1.0,
        }
        counts = [int(scores.counts[name][0]) for name in ("tp", "fn", "fp")]
        assert counts == [0, len(rows), len(found)]


def test_a_mask_without_pixels_is_still_a_detection() -> None:
    empty = masks.empty(HEIGHT, WIDTH)
    row = replace(track(boxes(BOX), 1), rles=(empty,))
    assert hota(dataset(row), []).combined.counts["fn"][0] == 1
    assert hota(dataset(), [row]).combined.counts["fp"][0] == 1
    assert hota(dataset(row), [row]).combined.counts["tp"][0] == 0


def test_frames_beyond_the_video_and_unknown_categories_do_not_count() -> None:
    row = track(boxes(BOX), 1)
    long = replace(row, rles=row.rles + row.rles[:1])
    other = replace(row, id=2, category_id=9)
    assert hota(dataset(row), [long, other]).combined.summary["HOTA"] == 1.0


def test_rules_differ_in_crowds_and_categories() -> None:
    crowd = replace(track(boxes((0, 0, 8, 8)), 2), iscrowd=True)
    truth = dataset(track(boxes((10, 10, 14, 14)), 1), crowd)
    inside = track(boxes((0, 0, 3, 3)), 1)
    counts = {
        rules: [int(hota(truth, [inside], rules=rules).combined.counts[n][0]) for n in ("fn", "fp")]
        for rules in RULES
    }
    # In `ytvis` the crowd is an object, with which the prediction overlaps by 9/64.
    assert counts == {"ytvis": [1, 0], "davis": [1, 1], "mots": [1, 0]}
    other = [replace(track(boxes((10, 10, 14, 14)), 1), category_id=2)]
    assert hota(truth, other, rules="mots").combined.counts["tp"][0] == 0
    assert hota(truth, other, rules="davis").combined.counts["tp"][0] == 1


def test_what_matches_half_is_never_excused() -> None:
    crowd = replace(track(boxes((0, 0, 8, 8)), 2), iscrowd=True)
    truth = dataset(track(boxes((0, 0, 4, 4)), 1), crowd)
    for box, tp in (((0, 0, 4, 8), 1), ((0, 0, 4, 9), 0)):  # IoU 1/2 and 16/36
        counts = hota(truth, [track(boxes(box), 1)], rules="mots").combined.counts
        assert (counts["tp"][0], counts["fp"][0]) == (tp, 0)
    edge = track(boxes((0, 6, 4, 10)), 1)  # half inside, not more
    assert hota(truth, [edge], rules="mots").combined.counts["fp"][0] == 1


def test_parts_add_up_to_the_whole() -> None:
    truth, found = scene(5)
    whole = hota(truth, found)
    parts = [whole.of_videos({video.id}) for video in VIDEOS]
    assert hota_metrics(Hota.joined(parts)) == hota_metrics(whole)
    alone = hota(
        replace(
            truth,
            videos=VIDEOS[:1],
            annotations=tuple(row for row in truth.annotations if row.video_id == 1),
        ),
        [row for row in found if row.video_id == 1],
    )
    assert alone.combined.summary == whole.of_video(1).summary


def test_categories_without_tracks_may_be_left_out() -> None:
    found = hota(dataset(track(boxes(BOX), 1)), [track(boxes(BOX), 1)])
    assert found.class_averaged().summary["HOTA"] == 0.5
    assert found.class_averaged(ignore_empty=True).summary["HOTA"] == 1.0
    assert hota(dataset(), []).class_averaged(ignore_empty=True).summary["HOTA"] == 0.0


def test_text_and_json() -> None:
    found = hota(*scene(1))
    document = json.loads(json.dumps(hota_metrics(found), allow_nan=False))
    assert document["HOTA"] == found.combined.summary["HOTA"]
    assert document["class_averaged"] == found.class_averaged().summary
    assert len(document["curves"]["AssA"]) == len(document["alphas"]) == 19
    assert [row["name"] for row in document["per_category"]] == ["car", "pedestrian"]
    lines = hota_table(found, per_category=True).splitlines()
    assert len(lines) == 5
    assert lines[1].split()[-10] == f"{document['HOTA']:.3f}"
    assert len(hota_table(found).splitlines()) == 3


def test_what_cannot_be_evaluated_is_an_error() -> None:
    row = track(boxes(BOX), 1)
    with pytest.raises(UsageError, match="rules are `coco`"):
        hota(dataset(row), [row], rules="coco")
    with pytest.raises(DataError, match="nothing to evaluate against"):
        hota(dataset(annotated=False), [row])
    with pytest.raises(DataError, match="nothing to evaluate against"):
        hota(dataset(row, categories=()), [row])
    with pytest.raises(DataError, match="of video 9"):
        hota(dataset(row), [replace(row, video_id=9)])
    small = replace(row, rles=(masks.empty(4, 4),))
    with pytest.raises(DataError, match=r"video 1 `0001`, frame 0: masks differ in size"):
        hota(dataset(row), [small])
