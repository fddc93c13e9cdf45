"""What goes into the spool comes out in order, and the living alone take memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmvis_core.errors import ResourceError
from pmvis_core.inference.track_spool import TrackSpool

CLASSES = 3
ACTIONS = st.lists(st.tuples(st.sampled_from("aaadeg"), st.integers(0, 4)), max_size=60)


@given(ACTIONS)
def test_it_is_a_dictionary_of_lists_that_forgets_what_is_dropped(actions):
    found, past = {}, []
    with TrackSpool(CLASSES) as spool:
        for frame, (action, identity) in enumerate(actions):
            if action in "ag":
                vector = np.float32([frame, identity, 0.5])
                counts = "é0`x" * (frame * (200 if action == "g" else 1))
                spool.add(identity, frame, vector, counts)
                found.setdefault(identity, []).append((frame, vector.tolist(), counts))
            elif identity in found and action == "d":
                spool.drop(identity)
                del found[identity]
            elif identity in found and action == "e":
                spool.end(identity)
                past.append((identity, found.pop(identity)))
        assert set(spool.alive) == set(found)
        summaries = list(spool.summaries())
        assert not spool.alive
        expected = [*past, *found.items()]
        expected.sort(key=lambda item: item[1][0][0])
        assert [s.identity for s in summaries] == [identity for identity, _ in expected]
        for summary, (_, rows) in zip(summaries, expected, strict=True):
            seen = [
                (a.frame, a.probabilities.tolist(), a.counts) for a in spool.appearances(summary)
            ]
            assert seen == rows
            assert (summary.number, summary.last_frame) == (len(rows), rows[-1][0])
            means = np.mean([row[1] for row in rows], axis=0)
            np.testing.assert_allclose(summary.scores("mean"), means, rtol=1e-12)
            assert summary.scores("max").tolist() == np.max([row[1] for row in rows], 0).tolist()


def test_nothing_is_left_in_its_folder(tmp_path):
    with TrackSpool(CLASSES, tmp_path) as spool:
        spool.add(1, 0, np.zeros(CLASSES, np.float32), "x")
        assert not list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ResourceError, match="nowhere"):
        TrackSpool(CLASSES, tmp_path / "nowhere")


def test_a_full_disk_is_an_error_of_the_resource_kind(tmp_path, monkeypatch):
    with TrackSpool(CLASSES, tmp_path) as spool:
        monkeypatch.setattr("os.pwrite", _no_space)
        with pytest.raises(ResourceError, match="No space left"):
            spool.add(1, 0, np.zeros(CLASSES, np.float32), "x")


def _no_space(*_: object) -> int:
    raise OSError(28, "No space left on device", str(Path("x")))
