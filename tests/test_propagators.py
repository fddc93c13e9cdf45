"""What every propagator promises, whatever carries the masks; and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.models import mobilenet_v2

from pmvis_core.errors import ResourceError, UsageError
from pmvis_core.models.deaot import DeAOT, Variant, build_deaot
from pmvis_core.nn.backbones import MobileNetV2
from pmvis_core.propagation.deaot import DeaotPropagator, DeaotSettings
from pmvis_core.propagation.flow import FlowPropagator, Prediction, Propagation, Propagator
from pmvis_core.propagation.frozen_features import FrozenFeatures
from pmvis_core.propagation.propagators import Choice, choose_propagator
from pmvis_core.propagation.sam2 import Sam2Propagator, load_sam2
from pmvis_core.types import VideoInfo
from pmvis_core.weights.deaot import save_deaot
from tests.parity_deaot import Stack
from tests.tiny_sam2 import build_tiny_sam2

HEIGHT, WIDTH, LENGTH = 40, 56, 6
INFO = VideoInfo(1, "clip", HEIGHT, WIDTH, LENGTH)
Mask = NDArray[np.uint8]
Results = list[dict[int, Prediction]]
CPU = torch.device("cpu")


def clip() -> NDArray[np.uint8]:
    """Return frames of a red textured square that moves over a green ground."""
    rng = np.random.default_rng(4)
    ground = rng.integers(0, 60, (HEIGHT, WIDTH, 3)) + np.array([10, 120, 10])
    skin = rng.integers(0, 60, (14, 14, 3)) + np.array([170, 10, 40])
    frames = np.repeat(ground[None], LENGTH, 0)
    for t in range(LENGTH):
        frames[t, 12:26, 6 + 2 * t : 20 + 2 * t] = skin
    return frames.astype(np.uint8)


FRAMES = clip()


def square(t: int) -> Mask:
    """Return the square's mask."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[12:26, 6 + 2 * t : 20 + 2 * t] = 1
    return mask


def corner() -> Mask:
    """Return the mask of a patch of ground."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[28:38, 40:54] = 1
    return mask


def make_flow() -> Propagator:
    return FlowPropagator()


def make_flow_with_features() -> Propagator:
    torch.manual_seed(0)
    return FlowPropagator(embed=FrozenFeatures(MobileNetV2(), short_edge=64))


def make_deaot(*, joint: bool = False) -> Propagator:
    torch.manual_seed(0)
    network = DeAOT(Variant("mobilenet_v2", 2, 2))
    return DeaotPropagator(network, CPU, DeaotSettings(joint=joint))


def make_joint_deaot() -> Propagator:
    return make_deaot(joint=True)


def make_sam2() -> Propagator:
    return Sam2Propagator(build_tiny_sam2(), CPU)


MAKERS = (make_flow, make_flow_with_features, make_deaot, make_joint_deaot, make_sam2)


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__[5:])
def propagator(request: pytest.FixtureRequest) -> Propagator:
    """Return each propagator in turn."""
    return request.param()  # type: ignore[no-any-return]


@pytest.fixture
def opened(propagator: Propagator) -> Propagation:
    """Return the clip opened for propagation."""
    return propagator.open(Stack(FRAMES), INFO)


def carry(video: Propagation, order: range, seeds: dict[int, tuple[int, Mask]]) -> Results:
    """Carry objects, each from its (frame, mask), along an order of frames."""
    sweep = video.sweep()
    results = []
    for t in order:
        results.append(sweep.advance(t))
        for number, (start, mask) in seeds.items():
            if start == t:
                sweep.add(number, mask)
    return results


def same(a: dict[int, Prediction], b: dict[int, Prediction], number: int) -> None:
    """Assert that an object was predicted alike."""
    np.testing.assert_array_equal(a[number].probability, b[number].probability)
    np.testing.assert_array_equal(a[number].mask, b[number].mask)
    assert a[number].confidence == b[number].confidence


@pytest.mark.parametrize("order", [range(LENGTH), range(LENGTH - 1, -1, -1)], ids=["on", "back"])
def test_every_live_object_is_predicted_in_every_frame(opened: Propagation, order: range) -> None:
    seeds = {7: (order[0], square(order[0])), 3: (order[0], corner())}
    first, *others = carry(opened, order, seeds)
    assert first == {}
    for found in others:
        assert set(found) == {3, 7}
        for prediction in found.values():
            mask, probability = prediction.mask, prediction.probability
            assert (mask.shape, mask.dtype) == ((HEIGHT, WIDTH), np.uint8)
            assert set(np.unique(mask)) <= {0, 1}
            assert (probability.shape, probability.dtype) == ((HEIGHT, WIDTH), np.float32)
            assert probability.min() >= 0
            assert probability.max() <= 1
            inside = probability[mask == 1]
            expected = inside.mean(dtype=np.float64) if inside.size else 0.0
            assert prediction.confidence == pytest.approx(expected, abs=1e-6)


def test_sweeps_share_no_memory(opened: Propagation) -> None:
    first = carry(opened, range(LENGTH), {0: (0, square(0))})
    carry(opened, range(LENGTH), {0: (0, corner())})
    again = carry(opened, range(LENGTH), {0: (0, square(0))})
    for a, b in zip(first[1:], again[1:], strict=True):
        same(a, b, 0)


def test_time_may_run_backwards(propagator: Propagator) -> None:
    """From the last frame back is the same as forwards through the reversed video."""
    mirror = propagator.open(Stack(FRAMES[::-1]), INFO)
    video = propagator.open(Stack(FRAMES), INFO)
    last = LENGTH - 1
    forward = carry(mirror, range(LENGTH), {0: (0, square(last))})
    backward = carry(video, range(last, -1, -1), {0: (last, square(last))})
    for a, b in zip(forward[1:], backward[1:], strict=True):
        same(a, b, 0)


def test_a_restart_forgets_what_was(opened: Propagation) -> None:
    fresh = carry(opened, range(2, LENGTH), {0: (2, square(2))})
    sweep = opened.sweep()
    sweep.advance(0)
    sweep.add(0, corner())
    sweep.advance(1)
    sweep.advance(2)
    sweep.add(0, square(2))
    for t, expected in zip(range(3, LENGTH), fresh[1:], strict=True):
        same(sweep.advance(t), expected, 0)


def test_objects_of_other_key_frames_do_not_matter(opened: Propagation) -> None:
    alone = carry(opened, range(LENGTH), {0: (0, square(0))})
    joined = carry(opened, range(LENGTH), {0: (0, square(0)), 1: (2, square(2))})
    for a, b in zip(alone[1:], joined[1:], strict=True):
        same(a, b, 0)
    assert [set(found) for found in joined] == [set(), {0}, {0}, {0, 1}, {0, 1}, {0, 1}]


@pytest.mark.parametrize("make", [make_flow, make_flow_with_features, make_deaot, make_sam2])
def test_separate_objects_of_one_key_frame_do_not_matter(make: Callable[[], Propagator]) -> None:
    video = make().open(Stack(FRAMES), INFO)
    alone = carry(video, range(LENGTH), {5: (0, square(0))})
    joined = carry(video, range(LENGTH), {2: (0, corner()), 5: (0, square(0)), 9: (0, square(0))})
    for a, b in zip(alone[1:], joined[1:], strict=True):
        same(a, b, 5)
        same({5: b[9]}, a, 5)


def test_dropped_objects_are_gone(opened: Propagation) -> None:
    sweep = opened.sweep()
    sweep.advance(0)
    sweep.add(0, square(0))
    sweep.add(1, corner())
    assert set(sweep.advance(1)) == {0, 1}
    sweep.drop(0)
    sweep.drop(8)
    assert set(sweep.advance(2)) == {1}
    sweep.drop(1)
    assert sweep.advance(3) == {}


def test_an_empty_mask_is_carried_without_complaint(opened: Propagation) -> None:
    results = carry(opened, range(3), {0: (0, np.zeros((HEIGHT, WIDTH), np.uint8))})
    assert set(results[-1]) == {0}


def test_inputs_are_left_alone(propagator: Propagator) -> None:
    frames, mask = FRAMES.copy(), square(0)
    video = propagator.open(Stack(frames), INFO)
    carry(video, range(3), {0: (0, mask)})
    np.testing.assert_array_equal(frames, FRAMES)
    np.testing.assert_array_equal(mask, square(0))


def test_sam2_keeps_no_more_than_it_looks_back_at() -> None:
    propagator = make_sam2()
    long = Stack(np.concatenate([FRAMES] * 4))
    video = propagator.open(long, VideoInfo(1, "long", HEIGHT, WIDTH, 4 * LENGTH))
    sweep = video.sweep()
    for t in range(4 * LENGTH):
        sweep.advance(t)
        if t == 0:
            sweep.add(0, square(0))
    (session,) = sweep._sessions.values()  # type: ignore[attr-defined]
    (outputs,) = session.output_dict_per_obj.values()
    assert len(outputs["non_cond_frame_outputs"]) == 4
    assert session.processed_frames is None


def test_sam2_is_read_from_a_folder(tmp_path: Path) -> None:
    model = build_tiny_sam2()
    model.save_pretrained(tmp_path / "sam2")
    chosen = choose_propagator(Choice("sam2", weights=tmp_path / "sam2", device="cpu"))
    assert chosen.facts["method"] == "sam2"
    assert len(chosen.facts["weights"]) == 16
    with pytest.raises(ResourceError, match=r"holds no `config\.json`"):
        load_sam2(tmp_path)


def test_deaot_is_read_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = tmp_path / "model.safetensors"
    save_deaot(file, build_deaot("deaott").state_dict(), "deaott")
    for weights in (file, tmp_path):
        choice = Choice("deaot", weights=weights, device="cpu", memory_limit=4, joint=False)
        chosen = choose_propagator(choice)
        assert isinstance(chosen.propagator, DeaotPropagator)
        digest = chosen.facts.pop("weights")
        assert len(digest) == 16
        assert chosen.facts == {
            "method": "deaot",
            "variant": "deaott",
            "max_long_edge": 1040,
            "memory_gap": 9999,
            "memory_limit": 4,
            "joint": False,
            "precision": "fp32",
        }
    with pytest.raises(UsageError, match="precision `int8`, expected one of: fp32, bf16, fp16"):
        choose_propagator(Choice("deaot", weights=file, device="cpu", precision="int8"))


def test_features_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "classifier.pth"
    torch.save(mobilenet_v2().state_dict(), file)
    chosen = choose_propagator(Choice("flow", features=file))
    assert len(chosen.facts["features"]) == 16
    results = carry(chosen.propagator.open(Stack(FRAMES), INFO), range(2), {0: (0, square(0))})
    assert results[-1][0].mask.any()
    torch.save({"features.0.0.weight": torch.zeros(32, 3, 3, 3)}, file)
    with pytest.raises(ResourceError, match="tensors of a MobileNetV2"):
        choose_propagator(Choice("flow", features=file))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice("magic"), "expected one of: flow, deaot, sam2"),
        (Choice("deaot"), "`--method deaot` needs `--weights`"),
        (Choice("sam2"), "`--method sam2` needs `--weights`"),
        (Choice("flow", memory_gap=3), "`--memory-gap` is for `deaot`, not for `flow`"),
        (Choice("flow", joint=False), "`--joint` is for `deaot`"),
        (Choice("sam2", short_edge=100), "`--short-edge` is for `flow`, not for `sam2`"),
        (Choice("deaot", features=Path("x")), "`--features` is for `flow`, not for `deaot`"),
        (Choice("flow", weights=Path("x")), "`--weights` is for `deaot` and `sam2`"),
    ],
)
def test_choices_that_cannot_be_meant(choice: Choice, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_propagator(choice)
