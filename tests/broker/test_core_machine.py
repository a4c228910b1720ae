"""The core against a model that knows only what was said: peers come, talk sense and nonsense, and die.

The model keeps, for each lease, what each of its slots is (leased, submitted, done, gone), from messages alone;
it knows nothing of rings, queues or batching.  That is enough to say which messages are legal, that no slot has
two owners or is granted while a worker may write to it, and that whatever was submitted ends exactly once.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.broker.core_rig import MS, Rig, everything, variant, written
from trtpool.broker import events as e
from trtpool.broker.batching import UNIFORM
from trtpool.broker.dispatch import BRIEF_NS, MAX_TOGETHER
from trtpool.ipc import messages as m

HUGE = 2**31 - 1
RECALL_NS = 5 * MS
GONE, LEASED, SUBMITTED, DONE = "gone", "leased", "submitted", "done"

small = st.sampled_from([0, 0, 1, 1, 2, 3, 5, 8, 13, HUGE])
priorities = st.sampled_from([0, 0, 1])
counts = st.sampled_from([1, 1, 1, 2, 2, 3, 5, 8, 20, HUGE])
wide = st.one_of(st.integers(0, 40), st.sampled_from([2**31, 2**63 - 1]))


@dataclass
class Lease:
    model: int
    first: int
    slots: list[str]
    seq: int = -1
    seqs: dict[int, int] = field(default_factory=dict)  # of each slot that was submitted
    items: dict[int, int] = field(default_factory=dict)
    pins: dict[int, int | None] = field(default_factory=dict)
    variants: dict[int, tuple[m.Shapes, bytes]] = field(default_factory=dict)

    def holds(self, at: int) -> bool:
        return self.slots[at] != GONE


@dataclass
class Client:
    leases: dict[int, Lease] = field(default_factory=dict)
    requests: dict[int, tuple[int, int]] = field(default_factory=dict)  # model and count, by number
    closed: bool = False


@dataclass
class Device:
    lanes: int = 0
    gpu: int | None = None
    leaving: bool = False
    generation: int = 0
    runs: dict[int, m.Run] = field(default_factory=dict)


def has_open_client(machine):
    return any(not client.closed for client in machine.living.values())


class CoreMachine(RuleBasedStateMachine):
    varies = False
    variants: tuple[tuple[m.Shapes, bytes], ...] = (UNIFORM,)
    wrong_variants: tuple[tuple[m.Shapes, bytes], ...] = ((((2, 3),), b""), ((), b"1"))

    @initialize(delay_us=st.sampled_from([0, 0, 2000]), cap=st.sampled_from([0, 0, 4]), gpus=st.sampled_from([0, 2, 3]))
    def start(self, delay_us, cap, gpus):
        self.rig = self.make_rig(delay_us, cap, gpus)
        self.gpus = gpus
        self.delay_us = delay_us
        self.models = self.rig.core.models
        self.living: dict[int, Client] = {}
        self.working: dict[int, Device] = {}
        self.next_peer = 1
        self.next_request = 1
        self.pids: dict[int, int] = {}
        self.active: dict[tuple[int, int], int] = defaultdict(int)  # when a peer last did something with a model
        self.evicted: set[int] = set()
        self.worker_joins(2, 0)
        self.producer_joins()

    def make_rig(self, delay_us, cap, gpus):
        rig = Rig(
            (12, 1, 4),
            (7, 3, 7),
            max_delay_us=delay_us,
            cap=cap,
            gpus=gpus,
            recall_timeout_s=RECALL_NS / 1e9,
            evict=True,
            varies=self.varies,
        )
        rig.core.leasing.max_waiting = 3
        return rig

    # --- What the core says, checked and learned ---

    def learn(self, actions):
        for action in actions:
            if isinstance(action, e.Send):
                learner = getattr(self, f"on_{type(action.message).__name__.lower()}", None)
                if learner:
                    learner(action.peer, action.message)
            elif isinstance(action, e.Forget):
                assert action.peer not in self.working
                client = self.living.get(action.peer)
                assert client is None or (client.closed and not self.held(client)), "forgotten with slots"
                self.living.pop(action.peer, None)
            elif isinstance(action, e.Evict):
                self.on_evict(action.peer)

    def on_evict(self, peer):
        """Its process did nothing for long, nothing of it is in flight, and others wait for what it holds."""
        same = [other for other in self.living if self.pids[other] == self.pids[peer]]
        assert not self.evicted & set(same), "once is enough"
        self.evicted |= set(same)
        waited_for = {
            model
            for other in self.living.keys() - set(same)
            for model, _ in self.living[other].requests.values()
            if self.rig.now_ns - max(self.active[one, model] for one in same) >= RECALL_NS
        }
        held = {
            lease.model: set(lease.slots)
            for one in same
            for lease in self.living[one].leases.values()
            if {LEASED, DONE} & set(lease.slots)
        }
        running = {
            lease.model for one in same for lease in self.living[one].leases.values() if SUBMITTED in lease.slots
        }
        assert waited_for & held.keys() - running, "nobody waits for what it holds, or it is not idle"

    def held(self, client, model=None):
        """``(model, slot)`` of each slot that is still the client's."""
        return {
            (lease.model, lease.first + at)
            for lease in client.leases.values()
            for at in range(len(lease.slots))
            if lease.holds(at) and model in (None, lease.model)
        }

    def on_a_device(self):
        return {
            (run.model, slot)
            for device in self.working.values()
            for run in device.runs.values()
            for rows in run.rows
            for slot in range(rows.first, rows.first + rows.count)
        }

    def on_grant(self, peer, grant):
        client = self.living[peer]
        assert not client.closed
        self.active[peer, grant.model] = self.rig.now_ns
        taken = self.on_a_device().union(*(self.held(other) for other in self.living.values()))
        for lease_id, run in grant.leases:
            new = {(grant.model, slot) for slot in range(run.first, run.first + run.count)}
            assert run.first + run.count <= self.models[grant.model].layout.slots
            assert taken.isdisjoint(new), "a slot has two owners, or a device writes to it"
            taken |= new
            assert all(lease_id not in other.leases for other in self.living.values())
            client.leases[lease_id] = Lease(grant.model, run.first, [LEASED] * run.count)
        if grant.request:
            assert client.requests.pop(grant.request) == (grant.model, sum(run.count for _, run in grant.leases))

    def on_done(self, peer, done):
        lease = self.living[peer].leases[done.lease]
        self.active[peer, lease.model] = self.rig.now_ns
        for at in range(done.first, done.first + done.count):
            assert lease.slots[at] == SUBMITTED, "it was not submitted, or has ended before"
            assert lease.seqs[at] == done.seq
            lease.slots[at] = DONE
            assert done.status == m.OK or done.text, "a failure has a reason"

    def on_run(self, peer, run):
        device, model = self.working[peer], self.models[run.model]
        assert len(device.runs) <= device.lanes
        assert not device.leaving, "it said that it must end, or was told to"
        assert device.generation == self.rig.core.generation, "an engine that was replaced, or is yet to serve, answers"
        # Several brief batches may go together; what is left of those that failed stays together until it is halved.
        several = run.attempt or 2 * self.rig.core.models[run.model].run_ns <= BRIEF_NS
        together = MAX_TOGETHER if several else 1
        assert sum(rows.items for rows in run.rows) <= together * model.max_batch
        busy = self.on_a_device()
        queued = {
            (lease.model, lease.first + at): (lease.items[at], lease.pins[at], lease.variants[at])
            for client in self.living.values()
            for lease in client.leases.values()
            for at, state in enumerate(lease.slots)
            if state == SUBMITTED and not client.closed
        }
        seen = set()
        for rows in run.rows:
            for index in range(rows.count):
                slot = (run.model, rows.first + index)
                assert slot not in busy, "two devices write to one slot"
                items, pin, variant = queued[slot]
                assert items == min(model.items_per_slot, rows.items - index * model.items_per_slot)
                assert pin in (None, device.gpu), "it runs on another GPU"
                busy.add(slot)
                seen.add(variant)
        ((shapes, _),) = seen
        assert run.shapes == shapes
        device.runs[run.batch] = run

    def on_error(self, peer, error):
        if error.request:
            assert self.living[peer].requests.pop(error.request), "answered twice"

    def expect(self, peer, message, legal):
        """Say it: what is legal gets no Error, and what is not gets one and changes nothing."""
        if legal:
            actions = self.rig.say(peer, message)
            assert not [a for a in actions if isinstance(a, e.Send) and isinstance(a.message, m.Error)]
            return actions
        self.rig.refused(peer, message)
        return []

    # --- Peers come and go ---

    @precondition(lambda self: len(self.living) < 5)
    @rule()
    def producer_joins(self):
        peer, self.next_peer = self.next_peer, self.next_peer + 1
        self.pids[peer] = [0, 77, 78][peer % 3] or 1000 + peer  # some are clients of one process
        self.rig.do(e.ProducerJoined(peer, self.pids[peer]))
        self.living[peer] = Client()

    @precondition(lambda self: len(self.working) < 3)
    @rule(lanes=st.integers(0, 3), gpu=st.integers(0, 2), ahead=st.sampled_from([0, 0, 0, 1, -1]))
    def worker_joins(self, lanes, gpu, ahead=0):
        peer, self.next_peer = self.next_peer, self.next_peer + 1
        generation = max(0, self.rig.core.generation + ahead)
        self.rig.do(e.WorkerJoined(peer, peer, generation))
        device = self.working[peer] = Device(lanes, gpu % self.gpus if self.gpus else None, generation=generation)
        if lanes:
            self.rig.refused(peer, m.Ready("a device", lanes, self.gpus + gpu))
            assert self.rig.say(peer, m.Ready("a device", lanes, device.gpu)) == [e.WorkerReady(peer)]

    def a_client(self, data, *, may_be_closed=False):
        """The number of one that lives."""
        living = [peer for peer, client in self.living.items() if may_be_closed or not client.closed]
        return data.draw(st.sampled_from(living), "peer")

    @precondition(has_open_client)
    @rule(data=st.data(), sure=st.integers(0, 2))
    def producer_closes(self, data, sure):
        peer = self.a_client(data)
        client = self.living[peer]
        if sure == 1:  # rather seldom
            client.closed = True
            client.requests.clear()
            dropped = self.rig.core.producers[peer].leases
            actions = self.rig.do(e.ProducerClosed(peer))
            # What was queued is quarantined as it is; only what runs on a device goes on.
            for lease_id, lease in client.leases.items():
                for at, state in enumerate(lease.slots):
                    if state == SUBMITTED and (lease.model, lease.first + at) not in self.on_a_device():
                        assert lease_id in dropped
                        lease.slots[at] = DONE
            self.learn(actions)

    @precondition(lambda self: self.living)
    @rule(data=st.data(), sure=st.integers(0, 2))
    def producer_ends(self, data, sure):
        peer = self.a_client(data, may_be_closed=True)
        if sure == 1:
            actions = self.rig.do(e.ProducerEnded(peer))
            del self.living[peer]
            self.learn(actions)

    @precondition(lambda self: self.working)
    @rule(data=st.data(), sure=st.integers(0, 1))
    def worker_ends(self, data, sure):
        if not sure:
            return
        peer = data.draw(st.sampled_from(sorted(self.working)), "peer")
        self.lose_runs(self.working.pop(peer).runs.values())
        self.learn(self.rig.do(e.WorkerEnded(peer, "SIGKILL")))

    @precondition(lambda self: self.working)
    @rule(data=st.data(), sure=st.integers(0, 2))
    def worker_says_why_it_must_end(self, data, sure):
        peer = data.draw(st.sampled_from(sorted(self.working)), "peer")
        if sure == 1:
            self.working[peer].leaving = True
            assert self.rig.say(peer, m.Bye(data.draw(st.sampled_from(["", "no memory"]), "why"))) == []

    @rule(ahead=st.integers(0, 1), sure=st.integers(0, 3))
    def other_engines_serve(self, ahead, sure):
        if sure == 1:
            generation = self.rig.core.generation + ahead
            assert self.rig.switch(generation) == [e.Switched(generation)]

    def on_bye(self, peer, _bye):
        device = self.working[peer]
        assert device.generation < self.rig.core.generation
        assert not device.runs, "it was told to end before it had finished"
        device.leaving = True

    def lose_runs(self, runs):
        """Slots of closed producers are not run again: they end where they stand, untold."""
        slots = {
            (run.model, slot)
            for run in runs
            for rows in run.rows
            for slot in range(rows.first, rows.first + rows.count)
        }
        for client in self.living.values():
            if client.closed:
                for lease in client.leases.values():
                    for at, state in enumerate(lease.slots):
                        if state == SUBMITTED and (lease.model, lease.first + at) in slots:
                            lease.slots[at] = DONE

    # --- Producers talk ---

    @precondition(has_open_client)
    @rule(
        data=st.data(),
        model=st.sampled_from([0, 0, 1, 1, 2, HUGE]),
        count=counts,
        wait=st.sampled_from([0, MS, 30 * MS, None]),
        priority=priorities,
    )
    def asks_for_slots(self, data, model, count, wait, priority):
        self.ask(self.a_client(data), model, count, wait, priority)

    def ask(self, peer, model, count, wait, priority=0):
        client = self.living[peer]
        request, self.next_request = self.next_request, self.next_request + 1
        message = m.Lease(request, model, count, wait, priority)
        if model >= len(self.models):
            self.rig.refused(peer, message)
        elif count > self.models[model].cap:
            self.rig.refused(peer, message, m.TOO_LARGE)
        elif wait != 0 and len(client.requests) == 3:
            assert "more may not" in self.rig.refused(peer, message, m.BUSY).text
        else:
            client.requests[request] = (model, count)
            self.learn(self.rig.say(peer, message))
            assert wait != 0 or request not in client.requests, "now or never"

    @rule(
        counts=st.lists(st.integers(1, 6), min_size=5, max_size=5),
        model=st.sampled_from([0, 1]),
        cut=st.booleans(),
        deadline=st.sampled_from([None, None, MS]),
        again=st.integers(0, 2),
        pins=st.lists(st.sampled_from([None, None, 0, 1, 2]), min_size=5, max_size=5),
        after_ns=st.sampled_from([0, MS]),
        classes=st.lists(priorities, min_size=5, max_size=5),
    )
    def everyone_works(self, counts, model, cut, deadline, again, pins, after_ns, classes):
        """Each client leases and submits at once, and the turn ends: so that something goes on."""
        while len(self.living) < 2:
            self.producer_joins()
        if not self.working:
            self.worker_joins(1, 0)
        everyone = zip(list(self.living.items()), counts, pins, classes, strict=False)
        for (peer, client), count, pin, priority in everyone:
            if client.closed:
                continue
            before = set(client.leases)
            self.ask(peer, model, min(count, self.models[model].cap), 0, priority)
            for lease_id in client.leases.keys() - before:
                lease = client.leases[lease_id]
                items = len(lease.slots) * self.models[lease.model].items_per_slot - (cut and lease.model)
                gpu = pin if pin is not None and pin < self.gpus else None
                variant = self.variants[(peer + lease_id) % len(self.variants)]
                message = m.Submit(lease_id, 0, len(lease.slots), 0, items, deadline, again, gpu, priority, *variant)
                self.submit(peer, lease_id, message, legal=True)
        self.turn_ends(after_ns)

    def a_lease(self, data, peer):
        """A lease that is this client's, mostly; else another's, or nobody's."""
        every = [lease for client in self.living.values() for lease in client.leases]
        mine = list(self.living[peer].leases) * 3
        lease_id = data.draw(st.sampled_from([*mine, *every, 2**63 - 1, 0]), "lease")
        return lease_id, self.living[peer].leases.get(lease_id)

    def a_range(self, data, lease):
        """Slots of a lease, mostly of one state; else anything."""
        if lease and data.draw(st.integers(0, 4), "sense"):
            first = data.draw(st.integers(0, len(lease.slots) - 1), "first")
            count = 1
            while first + count < len(lease.slots) and lease.slots[first + count] == lease.slots[first]:
                count += 1
            return first, data.draw(st.integers(1, count), "count")
        return data.draw(small, "first"), data.draw(counts, "count")

    @precondition(has_open_client)
    @rule(data=st.data(), deadline=st.sampled_from([None, None, 0, MS, 2**63 - 1]), priority=priorities)
    def submits(self, data, deadline, priority):
        peer = self.a_client(data)
        lease_id, lease = self.a_lease(data, peer)
        first, count = self.a_range(data, lease)
        model = self.models[lease.model if lease else 0]
        seq = data.draw(st.sampled_from([0, *([max(0, lease.seq), *[lease.seq + 1] * 6] if lease else [7])]), "seq")
        full = count * model.items_per_slot
        items = data.draw(st.sampled_from([*[min(full, HUGE)] * 5, min(full, HUGE) - 1 or 1, 1, HUGE]), "items")
        wanted = data.draw(st.sampled_from([0, 0, 1, 3, HUGE]), "again")
        gpu = data.draw(st.sampled_from([None, None, *range(self.gpus), *range(self.gpus), self.gpus, HUGE]), "gpu")
        variant = data.draw(st.sampled_from([*self.variants * 3, *self.wrong_variants]), "variant")
        legal = (
            lease is not None
            and variant in self.variants
            and any(lease.holds(at) for at in range(len(lease.slots)))
            and first + count <= len(lease.slots)
            and all(state in (LEASED, DONE) for state in lease.slots[first : first + count])
            and seq > lease.seq
            and full - model.items_per_slot < items <= full
            and wanted <= model.cap
            and (gpu is None or gpu < self.gpus)
        )
        message = m.Submit(lease_id, first, count, seq, items, deadline, wanted, gpu, priority, *variant)
        self.submit(peer, lease_id, message, legal)

    def submit(self, peer, lease_id, message, legal):
        assert self.expect(peer, message, legal) == []
        if legal:
            lease = self.living[peer].leases[lease_id]
            self.active[peer, lease.model] = self.rig.now_ns
            items_per_slot = self.models[lease.model].items_per_slot
            lease.seq = message.seq
            for index in range(message.count):
                at = message.first + index
                lease.slots[at], lease.seqs[at] = SUBMITTED, message.seq
                lease.items[at] = min(items_per_slot, message.items - index * items_per_slot)
                lease.pins[at] = message.gpu
                lease.variants[at] = (message.shapes, message.shared)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def releases(self, data):
        peer = self.a_client(data, may_be_closed=True)
        lease_id, lease = self.a_lease(data, peer)
        first, count = self.a_range(data, lease)
        legal = (
            lease is not None
            and first + count <= len(lease.slots)
            and all(state in (LEASED, DONE) for state in lease.slots[first : first + count])
        )
        actions = self.expect(peer, m.Release(lease_id, first, count), legal)
        if legal:
            lease.slots[first : first + count] = [GONE] * count
            self.active[peer, lease.model] = self.rig.now_ns
        self.learn(actions)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def cancels(self, data):
        peer = self.a_client(data, may_be_closed=True)
        lease_id, lease = self.a_lease(data, peer)
        first, count = self.a_range(data, lease)
        self.learn(self.expect(peer, m.Cancel(lease_id, first, count), True))

    # --- Workers talk ---

    @precondition(lambda self: self.working)
    @rule(data=st.data(), fails=st.sampled_from([False, False, True]))
    def answers(self, data, fails):
        peer = data.draw(st.sampled_from(sorted(self.working)), "peer")
        device = self.working[peer]
        every = [run for other in self.working.values() for run in other.runs]
        batch = data.draw(st.sampled_from([*[*device.runs] * 4, *every, 0, 2**63 - 1]), "batch")
        run = device.runs.get(batch)
        attempt = data.draw(st.sampled_from([run.attempt] * 5 + [run.attempt + 1] if run else [0, HUGE]), "attempt")
        legal = run is not None and attempt == run.attempt
        times = data.draw(st.sampled_from([0, 5, 2**63 - 1]), "times")
        shapes = written(run) if run else ()
        if not fails and data.draw(st.integers(0, 9), "lies") == 0:
            shapes, legal = (*shapes, (10,)), False
        message: m.ToBroker = m.Failed(batch, attempt, "no")
        if not fails:
            message = m.Finished(batch, attempt, times, times, times, times, 1, shapes=shapes)
        actions = self.expect(peer, message, legal)
        if legal:
            if fails:
                self.lose_runs([device.runs[batch]])
            del device.runs[batch]
        self.learn(actions)

    @rule(data=st.data(), value=wide, count=counts)
    @precondition(lambda self: self.living or self.working)
    def nonsense(self, data, value, count):
        """Messages that the peer's kind never sends."""
        workers_say = [m.Finished(value, 0, 1, 1, 1, 1), m.Failed(value, 0, ""), m.Ready("", 1), m.Hello(1, bytes(40))]
        producers_say = [
            m.Lease(1, 0, 1, 0), m.Submit(value, 0, count, 0, count), m.Release(value, 0, count),
            m.Cancel(value, 0, count), m.Status(value), m.Hello(0, bytes(40)),
        ]  # fmt: skip
        peer = data.draw(st.sampled_from([*self.living, *self.working]), "peer")
        if peer in self.working:
            self.rig.refused(peer, data.draw(st.sampled_from(producers_say), "message"))
        elif not self.living[peer].closed:
            self.rig.refused(peer, data.draw(st.sampled_from(workers_say), "message"))
        else:
            before = everything(self.rig.core)
            assert self.rig.say(peer, data.draw(st.sampled_from(workers_say), "message")) == []
            assert everything(self.rig.core) == before

    @precondition(has_open_client)
    @rule(data=st.data())
    def asks_for_figures(self, data):
        (answer,) = self.rig.say(self.a_client(data), m.Status(3))
        assert isinstance(answer, e.Send)
        assert isinstance(answer.message, m.Report)

    @rule()
    def everyone_answers_and_reads(self):
        """Each worker finishes what it has, and each producer gives back what is done."""
        for peer, device in self.working.items():
            for batch in list(device.runs):
                run = device.runs.pop(batch)
                self.learn(self.rig.finish(peer, run))
        for peer in list(self.living):
            for lease_id, lease in self.living[peer].leases.items():
                for at, state in enumerate(lease.slots):
                    if state == DONE:
                        lease.slots[at] = GONE
                        self.active[peer, lease.model] = self.rig.now_ns
                        self.learn(self.expect(peer, m.Release(lease_id, at, 1), True))
        self.turn_ends(0)

    @rule(after_ns=st.sampled_from([0, 0, MS // 2, 3 * MS]))
    def turn_ends(self, after_ns):
        self.learn(self.rig.turn(after_ns))
        self.check_that_nobody_is_idle_for_nothing()

    def check_that_nobody_is_idle_for_nothing(self):
        """A worker is idle only if nothing waits that may run on it, or if it is the one kept for suspects."""
        if self.delay_us:
            return
        waiting = {
            lease.pins[at]
            for client in self.living.values()
            for lease in client.leases.values()
            for at, state in enumerate(lease.slots)
            if state == SUBMITTED and (lease.model, lease.first + at) not in self.on_a_device()
        }
        if self.rig.core.books.suspects:
            lines = [line for model in self.models for line in model.lines]
            waiting = {line.gpu for line in lines if line.queue.items or line.urgent.items}
        idle = [
            device
            for device in self.working.values()
            if device.lanes and not device.leaving and not device.runs and {None, device.gpu} & waiting
            if device.generation == self.rig.core.generation
        ]
        assert len(idle) <= (self.rig.core.books.suspects > 0), f"{idle} could run what waits for {waiting}"

    # --- What always holds ---

    @invariant()
    def the_figures_are_the_models(self):
        if not hasattr(self, "rig"):
            return
        for index in range(len(self.models)):
            said = [
                state
                for client in self.living.values()
                for lease in client.leases.values()
                if lease.model == index
                for state in lease.slots
            ]
            free, leased, queued, running, done = self.rig.states(index)
            orphans = len(
                {slot for model, slot in self.on_a_device() if model == index}
                - {slot for client in self.living.values() for _, slot in self.held(client, index)}
            )
            assert leased == said.count(LEASED)
            assert done == said.count(DONE)
            assert queued + running == said.count(SUBMITTED) + orphans
            assert free == self.models[index].layout.slots - leased - queued - running - done

    def teardown(self):
        """Stop the pool: with a worker on each GPU all is done, all is answered, and every slot comes back."""
        if not hasattr(self, "rig"):
            return
        self.learn(self.rig.do(e.Drain()))
        assert not any(client.requests for client in self.living.values())
        self.workers_join_last()
        drained = False
        for _ in range(200):
            actions = self.rig.turn(3 * MS)
            drained = drained or e.Drained() in actions
            self.learn(actions)
            for peer, device in self.working.items():
                for run in list(device.runs.values()):
                    del device.runs[run.batch]
                    self.learn(self.rig.finish(peer, run))
            if drained:
                break
        assert drained
        for client in self.living.values():
            for lease in client.leases.values():
                assert SUBMITTED not in lease.slots, "something was lost"
        for peer in list(self.living):
            actions = self.rig.do(e.ProducerEnded(peer))
            del self.living[peer]
            assert actions == [e.Forget(peer)]
        for index, model in enumerate(self.models):
            assert self.rig.states(index) == (model.layout.slots, 0, 0, 0, 0)
        assert not self.rig.core.producers
        assert self.rig.turn(2**62) == []
        due_ns = self.rig.core.next_timer_ns()
        assert due_ns is None or due_ns > self.rig.now_ns

    def workers_join_last(self):
        for gpu in range(self.gpus) or [None]:
            peer, self.next_peer = self.next_peer, self.next_peer + 1
            self.rig.worker(peer, 1, gpu)
            self.working[peer] = Device(1, gpu, generation=self.rig.core.generation)


class VaryingMachine(CoreMachine):
    """The same with items of several shapes, and a shared input."""

    varies = True
    variants = (variant(1), variant(9), variant(9, shared=1))
    wrong_variants = (UNIFORM, variant(0), variant(10), (((2, 3), (2, 3)), bytes(16)), (((2, 3),), bytes(15)))


TestVarying = VaryingMachine.TestCase
TestVarying.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)

TestCore = CoreMachine.TestCase
TestCore.settings = settings(max_examples=250, stateful_step_count=100, deadline=None)
