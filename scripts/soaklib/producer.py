"""A producer process: ``python -m soaklib.producer RUN_DIR NUMBER ROLE SEED ROUNDS TRANSPORT``.

It works until its rounds are over or its standard input ends, and prints its ledger as a line after each.  A producer
of its own kind checks what it gets itself; whether it may end as it did, its parent knows.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import os
import random
import select
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import trtpool
from trtpool.ipc.handles import Result

from .ledger import Ledger, Sent
from .models import DEADLY, HANGS, WELL

PATIENCE_S: Final = 90.0
"""A result, or a slot, that takes longer is lost."""

HASH: Final = 65521  # a prime below 2**16: exact in float32
WIDE: Final = 4096
MAX_KEPT: Final = 3
MAX_SLOTS: Final = 8

Array = npt.NDArray[Any]


def inputs_for(model: str, producer: int, numbers: list[int], mark: float = WELL) -> Array:
    """Items that name their producer and themselves."""
    if model == "picky":
        return np.array([[producer << 32 | n, n % 4 if mark == WELL else 9] for n in numbers], np.int64)
    items = np.zeros((len(numbers), 4 if model == "negate" else WIDE), np.float32)
    for row, n in zip(items, numbers, strict=True):
        if model == "wide":
            row[:] = (np.arange(WIDE) * 7 + n * 31) % HASH
        row[:4] = producer, n % 2**24, (producer * 7919 + n * 104729) % HASH, mark
    return items


def is_answer(model: str, given: Array, answer: Array) -> bool:
    """Whether `answer`, of whatever shape, begins with what the model makes of `given`."""
    flat = answer.reshape(-1, given.shape[1])[: len(given)]
    return np.array_equal(flat, given if model == "picky" else -given)


class Piece:
    """Slots that are submitted together: one, or a run of them."""

    def __init__(self, lease: trtpool.Lease, given: Array, sent: list[Sent]) -> None:
        self.lease = lease
        self.given = given
        self.sent = sent
        self.cancelled = False
        self.submitted: trtpool.Submitted | None = None

    @property
    def items(self) -> int:
        return len(self.given)

    def submit(self, deadline_s: float | None) -> trtpool.Submitted:
        self.submitted = self.lease.submit(items=self.items, deadline_s=deadline_s)
        return self.submitted


class Caller:
    """One thread's work with a client."""

    def __init__(
        self, client: trtpool.Client, producer: int, numbers: Iterator[int], ledger: Ledger, rng: random.Random
    ) -> None:
        self.client = client
        self.producer = producer
        self.ledger = ledger
        self.rng = rng
        self._numbers = numbers
        self._models = [model.spec.name for model in client.models]
        self._per_slot = client.models[0].items_per_slot
        self._kept: list[tuple[str, Array, Array]] = []

    # ------------------------------------------------------------------ all kinds of calls

    def round(self) -> None:
        """One call, or a few that belong together."""
        work = self.rng.choices([self.submit_some, self.infer, self.map, self.write_nothing], [8, 3, 3, 1])[0]
        model = self.rng.choice(self._models)
        try:
            work(model)
        except trtpool.PoolBusy as error:
            self.ledger.blame("starved", 0, f"no slots within {PATIENCE_S} s: {error}")
        if self._kept and self.rng.random() < 0.3:
            self.look_at_kept()

    def take(self, count: int) -> list[int]:
        return list(itertools.islice(self._numbers, count))

    def lease(self, model: str, count: int) -> list[trtpool.Lease]:
        """Leases of `count` slots in all; none if the pool was too busy for a caller in a hurry."""
        hurry = self.rng.random() < 0.1
        timeout_s = self.rng.choice([0, 0.005]) if hurry else PATIENCE_S
        try:
            if count == 1:
                return [self.client.lease(model=model, timeout_s=timeout_s)]
            leases = self.client.lease_many(count, model=model, timeout_s=timeout_s)
            return leases.slots() if self.rng.random() < 0.5 else leases
        except trtpool.PoolBusy as error:
            if not hurry:
                raise
            self.ledger.refuse(error, "it was asked for at once")
            return []

    def piece(self, lease: trtpool.Lease, model: str, mark: float, *, deadline: bool) -> Piece:
        """Write into a lease; all of its slots but the last are full."""
        last = self.rng.randint(1, self._per_slot)
        sizes = [self._per_slot] * (lease.count - 1) + [last]
        given = inputs_for(model, self.producer, self.take(sum(sizes)), mark)
        views = lease.inputs["x"]
        views.reshape(-1, given.shape[1])[: len(given)] = given
        poison = "" if mark == WELL else "refused" if model == "picky" else "deadly" if mark == DEADLY else "hangs"
        piece = Piece(lease, given, [Sent(size, deadline, poison) for size in sizes])
        self.ledger.send(piece.sent)
        return piece

    def submit_some(self, model: str) -> None:
        """Lease, write, submit, read in one way or another, release."""
        rng = self.rng
        deadline_s = rng.uniform(0.001, 0.5) if rng.random() < 0.15 else None
        pieces = []
        for lease in self.lease(model, rng.choice([1, 1, 1, 2, 3, 5, MAX_SLOTS])):
            refused = model == "picky" and rng.random() < 0.05
            pieces.append(self.piece(lease, model, DEADLY if refused else WELL, deadline=deadline_s is not None))
        for piece in pieces:
            piece.submit(deadline_s)
        for piece in pieces:
            if rng.random() < 0.05:
                piece.cancelled = True
                assert piece.submitted is not None
                piece.submitted.cancel()
        say(self.ledger)  # so that it is known what was in flight, should we be killed now
        self.read(model, pieces)

    def read(self, model: str, pieces: list[Piece]) -> None:
        """Wait for the ends in one way or another, and check them."""
        rng = self.rng
        how = rng.choice(["in order", "last first", "wait", "as completed", "callback", "await", "late", "never"])
        works = [piece.submitted for piece in pieces if piece.submitted is not None]
        if how == "never":
            for piece in pieces:
                piece.lease.release()
                self.ledger.leave(piece.items)
            return
        if how == "last first":
            pieces.reverse()
        elif how == "wait":
            concurrent.futures.wait(works, PATIENCE_S)
        elif how == "as completed":
            futures: list[concurrent.futures.Future[Result]] = [*works]
            ended = enumerate(concurrent.futures.as_completed(futures, PATIENCE_S))
            order = {id(work): place for place, work in ended}
            pieces.sort(key=lambda piece: order[id(piece.submitted)])
        elif how == "callback":
            self.wait_by_callback(works)
        elif how == "await":
            asyncio.run(wait_awaiting(works))
        elif how == "late":
            time.sleep(rng.uniform(0, 0.2))
        for piece in pieces:
            self.check(model, piece)

    @staticmethod
    def wait_by_callback(works: list[trtpool.Submitted]) -> None:
        ended = threading.Semaphore(0)
        for work in works:
            work.add_done_callback(lambda _: ended.release())
        for _ in works:
            ended.acquire(timeout=PATIENCE_S)

    def check(self, model: str, piece: Piece) -> None:
        """See how a piece ended, slot by slot, and release it."""
        work = piece.submitted
        assert work is not None
        with piece.lease:
            try:
                result = work.result(PATIENCE_S, partial=True)
            except (trtpool.WorkError, TimeoutError) as error:
                for at, sent in enumerate(piece.sent):
                    self.ledger.end_badly(sent, work.errors.get(at, error), cancelled=piece.cancelled)
                return
            self.check_slots(model, piece, result)
            if len(self._kept) < MAX_KEPT and not work.errors and self.rng.random() < 0.05:
                self._kept.append((model, piece.given, result.outputs["y"]))

    def check_slots(self, model: str, piece: Piece, result: Result) -> None:
        first = 0
        for at, sent in enumerate(piece.sent):
            given = piece.given[first : first + sent.items]
            first += sent.items
            if at in result.errors:
                self.ledger.end_badly(sent, result.errors[at], cancelled=piece.cancelled)
            else:
                self.judge(model, given, result.at(at).outputs["y"])

    def judge(self, model: str, given: Array, answer: Array) -> None:
        if is_answer(model, given, answer):
            self.ledger.end_well(len(given))
        else:
            text = f"{model}: {given[0, :4].tolist()} was answered by {answer.reshape(-1)[:4].tolist()}"
            self.ledger.blame("wrong answer", len(given), text)

    def look_at_kept(self) -> None:
        """Arrays that were kept after the release of their slots are as they were."""
        for model, given, answer in self._kept:
            if not is_answer(model, given, answer):
                self.ledger.blame("kept array changed", 0, f"{model}: {given[0, :4].tolist()}")
        self._kept.clear()

    def infer(self, model: str) -> None:
        """Copies in and out, any number of items."""
        given = inputs_for(model, self.producer, self.take(self.rng.choice([1, 2, 7, 40])))
        sent = Sent(len(given))
        self.ledger.send([sent])
        try:
            answer = self.client.infer(x=given, model=model, timeout_s=PATIENCE_S)["y"]
        except trtpool.PoolBusy:
            self.ledger.take_back([sent])
            raise
        except (trtpool.WorkError, TimeoutError) as error:
            self.ledger.end_badly(sent, error)
        else:
            self.judge(model, given, answer)

    def map(self, model: str) -> None:
        """A stream, sometimes left early."""
        rng = self.rng
        chunks = [self.take(rng.randint(1, self._per_slot)) for _ in range(rng.choice([3, 20, 60]))]
        marks = {chunk[0]: DEADLY if model == "picky" and rng.random() < 0.02 else WELL for chunk in chunks}
        given: dict[int, Array] = {}
        left = 0  # items that were written and did not end yet

        def write(chunk: list[int], inputs: Mapping[str, Array]) -> int:
            nonlocal left
            items = given[chunk[0]] = inputs_for(model, self.producer, chunk, marks[chunk[0]])
            inputs["x"].reshape(-1, items.shape[1])[: len(items)] = items
            self.ledger.send([Sent(len(chunk))])
            left += len(chunk)
            return len(chunk)

        leave_at = rng.randrange(len(chunks)) if rng.random() < 0.1 else len(chunks)
        stream = self.client.map(
            write, chunks, window=rng.choice([1, 4, 16]), ordered=rng.random() < 0.5, model=model,
            timeout_s=PATIENCE_S, return_exceptions=True,
        )  # fmt: skip
        for seen, (chunk, result) in enumerate(stream):
            left -= len(chunk)
            if isinstance(result, BaseException):
                poison = "" if marks[chunk[0]] == WELL else "refused"
                self.ledger.end_badly(Sent(len(chunk), poison=poison), result)
            else:
                self.judge(model, given[chunk[0]], result.outputs["y"])
            if seen == leave_at:
                break
        stream.close()
        self.ledger.leave(left)

    def write_nothing(self, model: str) -> None:
        """Lease and release."""
        for lease in self.lease(model, self.rng.choice([1, 4])):
            lease.release()

    # ------------------------------------------------------------------ what some do

    def submit_poison(self) -> None:
        """One input that kills or hangs workers among good ones, which must succeed."""
        mark = self.rng.choice([DEADLY, DEADLY, HANGS])
        with self.client.lease_many(4, model="negate", timeout_s=PATIENCE_S) as leases:
            slots = leases.slots()
            bad = self.rng.randrange(len(slots))
            pieces = [
                self.piece(slot, "negate", mark if at == bad else WELL, deadline=False) for at, slot in enumerate(slots)
            ]
            for piece in pieces:
                piece.submit(None)
            for piece in pieces:
                self.check("negate", piece)

    def submit_and_forget(self, count: int) -> list[Piece]:
        """Submit what nobody will read."""
        leases = [
            self.client.lease(model=self.rng.choice(self._models[:2]), timeout_s=PATIENCE_S) for _ in range(count)
        ]
        pieces = []
        for lease in leases:
            model = lease._claim.model.spec.name  # noqa: SLF001
            pieces.append(self.piece(lease, model, WELL, deadline=False))
        for piece in pieces:
            piece.submit(None)
            self.ledger.leave(piece.items)
        return pieces


def say(ledger: Ledger, *, final: bool = False) -> None:
    """Print the ledger, in one piece beside what other threads print."""
    os.write(1, (ledger.line(final=final) + "\n").encode())


async def wait_awaiting(works: list[trtpool.Submitted]) -> None:
    """Wait for all, as a coroutine does."""

    async def one(work: trtpool.Submitted) -> Result:
        return await work

    await asyncio.wait_for(asyncio.gather(*map(one, works), return_exceptions=True), PATIENCE_S)


# ---------------------------------------------------------------------- roles


class Producer:
    """The process."""

    def __init__(self, run_dir: str, number: int, seed: int, rounds: int, transport: str) -> None:
        self.client = trtpool.connect(run_dir=run_dir, transport=transport)
        self.run_dir = run_dir
        self.number = number
        self.rounds = rounds
        self.rng = random.Random(seed)
        self.ledger = Ledger()
        self._numbers = itertools.count(1)

    def caller(self) -> Caller:
        rng = random.Random(self.rng.random())
        return Caller(self.client, self.number, self._numbers, self.ledger, rng)

    @staticmethod
    def wanted() -> bool:
        """Whether the parent still wants us to go on."""
        return not select.select([0], [], [], 0)[0]

    def work(self, caller: Caller, rounds: int) -> None:
        for _ in range(rounds):
            if not self.wanted():
                break
            caller.round()
            say(self.ledger)
        caller.look_at_kept()

    def steady(self) -> None:
        self.work(self.caller(), self.rounds)

    def threads(self) -> None:
        count = self.rng.choice([2, 3])
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            for work in [pool.submit(self.work, self.caller(), self.rounds // count) for _ in range(count)]:
                work.result()

    def forker(self) -> None:
        """Fork with slots leased and work in flight; the child's client must refuse, and one of its own works."""
        caller = self.caller()
        for _ in range(self.rng.choice([1, 3])):
            pieces = [caller.piece(lease, "negate", WELL, deadline=False) for lease in caller.lease("negate", 2)]
            for piece in pieces:
                piece.submit(None)
            connects = self.rng.random() < 0.5
            child = os.fork()
            if not child:
                os._exit(self.in_child(connects=connects))
            for piece in pieces:
                caller.check("negate", piece)
            self.work(caller, self.rounds // 4)
            _, status = os.waitpid(child, 0)
            if status:
                self.ledger.blame("forked child", 0, f"it ended with status {status}")

    def in_child(self, *, connects: bool) -> int:
        """Returns the child's exit code."""
        try:
            self.client.lease(model="negate")
        except trtpool.ForkedClient:
            pass
        else:
            return 3
        time.sleep(self.rng.uniform(0, 0.3))
        if connects:
            given = inputs_for("negate", self.number, [0])
            with trtpool.connect(run_dir=self.run_dir) as own:
                return (
                    0
                    if is_answer("negate", given, own.infer(x=given, model="negate", timeout_s=PATIENCE_S)["y"])
                    else 4
                )
        return 0

    def leaver(self) -> None:
        """Submit and exit, in one of the ways to exit."""
        pieces = self.caller().submit_and_forget(self.rng.choice([1, 4, MAX_SLOTS]))
        say(self.ledger, final=True)
        how = self.rng.choice(["_exit", "exit", "close"])
        if how == "_exit":
            os._exit(0)
        if how == "close":
            self.client.close()
        del pieces
        sys.exit(0)

    def leaker(self) -> None:
        """Lease and submit, read nothing, give nothing back, and stay."""
        caller = self.caller()
        kept = [self.client.lease(model="negate", timeout_s=PATIENCE_S) for _ in range(2)]
        views = [lease.inputs["x"] for lease in kept]
        pieces = caller.submit_and_forget(2)
        say(self.ledger, final=True)
        select.select([0], [], [], self.rng.uniform(0.2, 3))
        del views, pieces
        os._exit(0)

    def poisoner(self) -> None:
        caller = self.caller()
        caller.submit_poison()
        self.work(caller, self.rounds // 4)


def main() -> None:
    # From 3.12 on Python says so of every fork beside a thread; that is what some do here.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    run_dir, number, role, seed, rounds, transport = sys.argv[1:]
    producer = Producer(run_dir, int(number), int(seed), int(rounds), transport)
    work: Callable[[], None] = getattr(producer, role)
    work()
    producer.client.close()
    say(producer.ledger, final=True)


if __name__ == "__main__":
    main()
