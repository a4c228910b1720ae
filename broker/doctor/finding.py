"""What a check says, and what it looks at."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import msgspec

Status: TypeAlias = Literal["ok", "warning", "problem"]


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the report.

    Attributes:
        check: what was looked at, such as "huge-pages"; one check may find several things.
        status: "problem": a pool, or a device that is here, cannot be used; "warning": something is worse than it
            could be.
        text: what is so.
        remedy: what to do; empty if nothing needs to be done.
    """

    check: str
    status: Status
    text: str
    remedy: str = ""


class Host(NamedTuple):
    """A machine as its files show it.

    Attributes:
        root: what they are below; tests put another directory here.
    """

    root: Path = Path("/")

    def text(self, path: str) -> str | None:
        """What a file such as "proc/version" holds, without white space around it; None if it cannot be read."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (self.root / path).read_text().strip()
        return None

    def number(self, path: str) -> int | None:
        """The same of a file that holds a number; None if it holds none, such as "max"."""
        with contextlib.suppress(ValueError):
            return int(self.text(path) or "")
        return None

    def exists(self, path: str) -> bool:
        """Whether there is such a file or directory."""
        with contextlib.suppress(OSError):
            return (self.root / path).exists()
        return False

    @property
    def in_container(self) -> str:
        """What kind of container this is: "docker", "podman", "kubernetes", another word, or "" for none."""
        environment = (self.text("proc/1/environ") or "").split("\0")
        named = next((word.partition("=")[2] for word in environment if word.startswith("container=")), "")
        if self.exists("var/run/secrets/kubernetes.io"):
            return "kubernetes"
        if self.exists(".dockerenv"):
            return "docker"
        return named or ("podman" if self.exists("run/.containerenv") else "")
