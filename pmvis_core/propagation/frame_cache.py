"""What propagators share of a video's frames: reading the next one ahead, and what is made of them.

Neighbouring frames follow each other, so the next is read while the network works on this one. What
several passes need of a frame (features, flow) stays in a `BoundedCache` as long as there is room.

    images = ReadAhead(frames, video.length, prepare)
    features = BoundedCache(1 << 30, size_of)
    found = features.get(t, lambda: encode(images[t]))
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
V = TypeVar("V")


class Frames(Protocol):
    """The frames of one video (`pmvis_core.video.frames.FrameSource` is one)."""

    def frames(self) -> Iterator[Bytes]:
        """Yield all frames in order: (H, W, 3) uint8 RGB."""
        ...

    def __getitem__(self, t: int) -> Bytes:
        """Return frame ``t``: (H, W, 3) uint8 RGB."""
        ...


class BoundedCache(Generic[V]):
    """A cache that forgets what was used longest ago when it holds too many bytes."""

    def __init__(self, limit_bytes: int, size_of: Callable[[V], int]) -> None:
        """Start empty."""
        self._limit, self._size_of = limit_bytes, size_of
        self._held = 0
        self._items: OrderedDict[Hashable, V] = OrderedDict()

    def find(self, key: Hashable) -> V | None:
        """Return the item of ``key`` if it is held."""
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """Return the item of ``key``, made by ``make`` if it is not held."""
        item = self.find(key)
        return self.put(key, make()) if item is None else item

    def put(self, key: Hashable, item: V) -> V:
        """Hold and return ``item``; the newest item is held however large it is."""
        if key in self._items:
            self._held -= self._size_of(self._items.pop(key))
        self._items[key] = item
        self._held += self._size_of(item)
        while self._held > self._limit and len(self._items) > 1:
            _, old = self._items.popitem(last=False)
            self._held -= self._size_of(old)
        return item


class ReadAhead(Generic[V]):
    """Frames as a network takes them, the next one being read while the last is worked on."""

    def __init__(self, frames: Frames, length: int, prepare: Callable[[Bytes], V]) -> None:
        """Read nothing yet.

        Args:
            frames: of the video.
            length: their number.
            prepare: turns a frame into what is wanted of it; called in another thread.
        """
        self._frames, self._length, self._prepare = frames, length, prepare
        self._stream = frames.frames()
        self._passed = 0
        self._last = -1
        self._thread = ThreadPoolExecutor(1, "frames")
        self._ahead: tuple[int, Future[V]] | None = None

    def __getitem__(self, t: int) -> V:
        """Return frame ``t``, prepared.

        Raises:
            DataError: as reading the frames does.
        """
        ahead, self._ahead = self._ahead, None
        coming = ahead[1] if ahead and ahead[0] == t else self._thread.submit(self._read, t)
        following = t + (1 if t >= self._last else -1)
        self._last = t
        found = coming.result()
        if 0 <= following < self._length:
            self._ahead = following, self._thread.submit(self._read, following)
        return found

    def _read(self, t: int) -> V:
        """Read a frame: from the stream if that has not passed it, for seeking is slow."""
        if t < self._passed:
            return self._prepare(self._frames[t])
        frame = next(islice(self._stream, t - self._passed, None))
        self._passed = t + 1
        return self._prepare(frame)
