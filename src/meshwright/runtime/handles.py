"""Defines what can be waited for: an operation in flight, or all messages of an instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch.distributed import Work


class Handle(Protocol):
    """Declares how an operation in flight can be polled and waited for, as torch.distributed.Work
    can."""

    def is_completed(self) -> bool:
        """Returns True if the operation has completed."""

    def wait(self) -> object:
        """Waits until the operation has completed; raises if it has failed."""


class JointHandle:
    """Joins the messages of one instruction in one handle."""

    __slots__ = ("works",)

    def __init__(self, works: Sequence[Work]) -> None:
        self.works = works

    def is_completed(self) -> bool:
        """Returns True if all messages have arrived."""
        return all(work.is_completed() for work in self.works)

    def wait(self) -> None:
        """Waits until all messages have arrived; on CUDA the current stream waits, not the host."""
        for work in self.works:
            work.wait()


def joint_handle(works: Sequence[Work]) -> Handle:
    """Returns one handle for all messages of an instruction."""
    return works[0] if len(works) == 1 else JointHandle(works)
