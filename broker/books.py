"""The core's books: who there is, what time it is, and what is to be said.

The parts of the core (`leasing`, `works`, `dispatch`, `recall`, `hangs`) share these and nothing else but each
other's public methods::

    core --> dispatch --> works --> leasing --> recall --> timers
               '--> hangs --> timers

An arrow means "calls"; all of them read and write the books.
"""

from __future__ import annotations

from trtpool.ipc import messages as m

from .events import Action, Forget
from .records import Model, Producer, Worker
from .shares import Shares


class Refused(Exception):
    """A message is illegal now; answered with an Error."""

    def __init__(self, code: int, text: str, request: int = 0) -> None:
        super().__init__(text)
        self.code = code
        self.request = request


class Books:
    """See the module's docstring.

    Args:
        models: as messages number them.
        gpus: how many GPUs the pool has; 0 on the CPU.
        now_ns: when the pool started.

    Attributes:
        serving: workers that may be sent work.
        retiring: workers of an older generation that have yet to be told Bye, when they have finished what they have.
        shares: how models share the workers.
        now_ns: when what is being handled came.
        draining: no more slots are granted.
        urgent: interactive works that are queued.
        suspects: groups of work that must run alone, waiting or running.
        mail: messages for each peer since `Core.take`, in order.
        actions: what else is to be done since then.
    """

    __slots__ = (
        "actions", "draining", "gpus", "mail", "models", "now_ns", "producers", "retiring", "serving", "shares",
        "suspects", "urgent", "workers",
    )  # fmt: skip

    def __init__(self, models: list[Model], gpus: int, now_ns: int) -> None:
        self.models = models
        self.gpus = gpus
        self.now_ns = now_ns
        self.producers: dict[int, Producer] = {}
        self.workers: dict[int, Worker] = {}
        self.serving: list[Worker] = []
        self.retiring: list[Worker] = []
        self.shares = Shares()
        self.draining = False
        self.urgent = 0
        self.suspects = 0
        self.mail: dict[int, list[m.FromBroker]] = {}
        self.actions: list[Action] = []

    def send(self, peer: int, message: m.FromBroker) -> None:
        """Say something to a peer, at the end of the turn."""
        mail = self.mail.get(peer)
        if mail is None:
            self.mail[peer] = [message]
        else:
            mail.append(message)

    def check_gpu(self, gpu: int) -> None:
        """Refuse what names a GPU that there is not."""
        if gpu >= self.gpus:
            raise Refused(m.BAD_MESSAGE, f"GPU {gpu} of a pool with {self.gpus} GPUs, which are counted from 0")

    def stop_serving(self, worker: Worker) -> None:
        """The worker gets no more work."""
        for workers in (self.serving, self.retiring):
            if worker in workers:
                workers.remove(worker)

    def forget_if_empty(self, producer: Producer) -> None:
        """Forget a producer whose lifeline has ended, once it holds nothing that somebody may still write."""
        if producer.closed and not producer.leases and producer.peer in self.producers:
            del self.producers[producer.peer]
            for model in self.models:
                model.unasked.pop(producer, None)
            self.actions.append(Forget(producer.peer))
