"""What one peer was sent: how many frames, and those that it may have to be sent again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

from trtpool.ipc import messages as m
from trtpool.ipc.pipe import FRAME_BYTES, Post


class SavedMail(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Mail in a snapshot; `unsent` is all that is kept, and `zmq` how many frames were heard, and told to be."""

    made: int
    unsent: list[bytes]
    worker: int | None
    zmq: tuple[int, int] | None


@dataclass
class Mail:
    """What was sent to one peer.

    Attributes:
        made: frames that were made for it.
        unsent: the last of these, which wait, or which it has perhaps not been sent.
        worker: the supervisor's number for it, if it is a worker.
        post: what it has not said it heard, `unsent` included, and what it was told that we heard; None for one that
            talks over its lifeline.
    """

    made: int = 0
    unsent: deque[bytes] = field(default_factory=deque)
    worker: int | None = None
    post: Post | None = None

    @property
    def zmq(self) -> bool:
        """Whether its messages go over ZeroMQ."""
        return self.post is not None

    @property
    def kept(self) -> deque[bytes]:
        """Frames that are kept for it."""
        return self.unsent if self.post is None else self.post.unheard

    @property
    def said(self) -> int:
        """How many frames it has certainly been sent."""
        return self.made - len(self.unsent)

    def add(self, frames: list[bytes]) -> None:
        """Frames for it."""
        self.made += len(frames)
        self.unsent += frames
        if self.post is not None:
            self.post.keep(frames)

    def hear_of(self, heard: int) -> None:
        """It has had so many.

        Raises:
            ProtocolError: so many were not made.
        """
        assert self.post is not None
        self.post.drop(heard)
        for _ in range(len(self.unsent) - len(self.post.unheard)):
            self.unsent.popleft()

    def clear(self) -> None:
        """It reads nothing any more."""
        self.unsent.clear()
        if self.post is not None:
            self.post.unheard.clear()

    def save(self) -> SavedMail:
        """As it stands in a snapshot."""
        post = self.post
        if post is None:
            return SavedMail(self.made, list(self.unsent), self.worker, None)
        return SavedMail(self.made, list(post.unheard), None, (post.heard, post.told))

    @classmethod
    def restore(cls, saved: SavedMail) -> Mail:
        """As it was saved."""
        mail = cls(saved.made, deque(saved.unsent), saved.worker)
        if saved.zmq is not None:
            post = mail.post = Post()
            post.heard, post.told = saved.zmq
            post.made, post.unheard = saved.made, deque(saved.unsent)
        return mail


def frames_of(messages: list[m.FromBroker]) -> list[bytes]:
    """Messages in one frame, or in as many as it takes."""
    frame = m.encode(messages)
    if len(frame) <= FRAME_BYTES or len(messages) == 1:
        return [frame]
    middle = len(messages) // 2
    return frames_of(messages[:middle]) + frames_of(messages[middle:])
