"""Every error trtpool raises, grouped by who must act.

::

    TrtpoolError
    |-- UsageError            your code: the call cannot be right
    |   |-- InvalidInput      wrong name, shape, dtype or count        (also ValueError)
    |   |-- SpentHandle       the handle was submitted or released
    |   |-- LeaseTooLarge     more slots than this client may ever hold (also ValueError)
    |   |-- ForkedClient      this client belongs to the parent process
    |-- ConfigError           whoever starts the pool: an option or file must change
    |   |-- ModelError        no such file, not a model, no fixed item shape
    |   |-- ArenaTooLarge     more slots than memory
    |   |-- RunDirError       run directory: owner, mode, link, path too long
    |   |-- NameInUse         a pool of that name runs already
    |   |-- DeviceUnavailable the device asked for cannot be used here
    |   |-- MissingExtra      an optional package is not installed
    |-- PoolError             whoever operates the pool: wait, start or restart it
    |   |-- PoolNotFound      nothing runs under that name
    |   |-- AccessDenied      this user may not attach
    |   |-- PoolBusy          no slot came free in time                (also TimeoutError)
    |   |-- PoolClosed        the pool has ended, or is draining
    |   |-- StartFailed       a broker or worker did not become ready
    |-- WorkError             this one item; the others are not affected
    |   |-- DeadlineExceeded  its deadline passed in the queue
    |   |-- Cancelled         cancelled before it was dispatched
    |   |-- EngineFailed      the engine refused it, alone
    |   |-- WorkerDied        it ended every worker that ran it alone
    |-- ProtocolError         nobody but us: a peer broke the protocol, please report

The text of each says what to do.  `exit_code` is what the command line exits with;
`trtpool --help` prints the table.
"""

from __future__ import annotations

import reprlib


class TrtpoolError(Exception):
    """Base of all errors raised by trtpool."""

    exit_code = 1


class UsageError(TrtpoolError):
    """The calling code must change."""


class InvalidInput(UsageError, ValueError):
    """A name, shape, dtype or count that does not fit the model."""


class SpentHandle(UsageError):
    """The handle was submitted or released and names nothing any more."""


class LeaseTooLarge(UsageError, ValueError):
    """More slots were asked for than this client may ever hold at once."""


class ForkedClient(UsageError):
    """A client connected before `fork()` was used in the child."""


class ConfigError(TrtpoolError):
    """An option or a file must change before the pool can start."""

    exit_code = 3


class ModelError(ConfigError):
    """The model file cannot be served as it is."""

    exit_code = 4


class ArenaTooLarge(ConfigError):
    """The arena asked for does not fit into memory."""

    exit_code = 5


class RunDirError(ConfigError):
    """The run directory cannot be used."""

    exit_code = 6


class NameInUse(ConfigError):
    """A pool of this name runs already."""

    exit_code = 7


class DeviceUnavailable(ConfigError):
    """The device asked for cannot be used on this machine."""

    exit_code = 8


class MissingExtra(ConfigError):
    """A package from one of trtpool's extras is needed and not installed."""

    exit_code = 9


class PoolError(TrtpoolError):
    """Something about the pool as a whole, not about one item."""

    exit_code = 10


class PoolNotFound(PoolError):
    """No pool runs under this name."""

    exit_code = 11


class AccessDenied(PoolError):
    """This user may not attach to the pool."""

    exit_code = 12


class PoolBusy(PoolError, TimeoutError):
    """No slots came free within the time allowed."""

    exit_code = 13


class PoolClosed(PoolError):
    """The pool has ended, or is draining and takes nothing new."""

    exit_code = 14


class StartFailed(PoolError):
    """The pool's own processes did not become ready."""

    exit_code = 15


class WorkError(TrtpoolError):
    """One submitted item ended without a result.

    Attributes:
        slots: the rows of the submission that failed, as a range counted from its first slot.
        work_id: what logs call the submission, such as "12.3".
        index: out of `map`, `infer` and `trtpool.arrow`: the place of the item, or of the first that failed, counted
            from 0; else None.
        item: out of `map`: the item itself.  A pickled error leaves it behind, and keeps what its text says of it.
    """

    exit_code = 20

    def __init__(self, text: str, slots: range = range(1), work_id: str = "") -> None:
        super().__init__(text)
        self.slots = slots
        self.work_id = work_id
        self.index: int | None = None
        self.item: object = None
        self._named = ""

    def name_item(self, index: int, item: object = None) -> None:
        """Have the text say which item it was."""
        self.index, self.item = index, item
        self._named = f" (item {index})" if item is None else f" (item {index}: {describe_item(item)})"

    def __str__(self) -> str:
        return super().__str__() + self._named

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[0], self.slots, self.work_id), {"index": self.index, "_named": self._named}


class DeadlineExceeded(WorkError):
    """The deadline passed while the item was queued; no device was touched."""


class Cancelled(WorkError):
    """The item was cancelled before it was dispatched."""


class EngineFailed(WorkError):
    """The engine failed on this item, run alone."""


class WorkerDied(WorkError):
    """Each worker that ran this item alone ended."""


class ProtocolError(TrtpoolError):
    """A peer sent something that the protocol does not allow."""

    exit_code = 30


def describe_item(item: object) -> str:
    """An item in a line of an error's text, however large it is or however it prints."""
    return " ".join(_BRIEF.repr(item).split())


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 120


def of_exit_code(code: int) -> type[TrtpoolError]:
    """The error that a process of ours ended with, by its exit code; `StartFailed` for a code of no single error."""
    return _BY_EXIT_CODE.get(code, StartFailed)


_BY_EXIT_CODE = {
    kind.exit_code: kind
    for kind in (
        ConfigError, ModelError, ArenaTooLarge, RunDirError, NameInUse, DeviceUnavailable, MissingExtra,
        PoolNotFound, AccessDenied, PoolBusy, PoolClosed, StartFailed, ProtocolError,
    )
}  # fmt: skip
