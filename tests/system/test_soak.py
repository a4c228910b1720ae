"""A minute of `scripts/soak.py`: a real pool under random load and random faults, from a seed."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from scripts.soaklib import plan
from scripts.soaklib.ledger import Ledger, Sent

import trtpool

SOAK = Path(__file__).resolve().parent.parent.parent / "scripts" / "soak.py"


@pytest.mark.soak
@pytest.mark.timeout(400)  # it waits two minutes for a pool that does not come to rest, and says so itself
def test_a_minute_of_random_load_and_random_faults():
    command = [sys.executable, str(SOAK), "--minutes=1", "--seed=4"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "items answered, and right" in result.stdout


def test_a_seed_decides_load_and_faults():
    def begin(seed: int) -> tuple[object, ...]:
        faults = itertools.islice(plan.faults(seed, 0.7), 500)
        return plan.pool_plan(seed), *itertools.islice(plan.producer_plans(seed), 50), *faults

    assert begin(3) == begin(3)
    assert begin(3) != begin(4)
    assert any("kill broker" in str(step) for step in begin(3))
    assert any("zmq" in str(step) for step in begin(3))


@pytest.mark.parametrize(
    ("sent", "cancelled", "error", "allowed"),
    [
        (Sent(2, deadline=True), False, trtpool.DeadlineExceeded("late"), True),
        (Sent(2), False, trtpool.DeadlineExceeded("late"), False),
        (Sent(2), True, trtpool.Cancelled("asked"), True),
        (Sent(2), False, trtpool.Cancelled("asked"), False),
        (Sent(2, poison="refused"), False, trtpool.EngineFailed("no"), True),
        (Sent(2, poison="deadly"), False, trtpool.EngineFailed("no"), False),
        (Sent(2, poison="hangs"), False, trtpool.WorkerDied("it hung"), True),
        (Sent(2), False, trtpool.WorkerDied("SIGKILL (tried alone 3 times)"), True),
        (Sent(2), False, trtpool.WorkerDied("SIGKILL"), False),
        (Sent(2), False, trtpool.PoolClosed("gone"), False),
        (Sent(2), False, TimeoutError("no result"), False),
    ],
)
def test_an_error_needs_an_excuse(sent, cancelled, error, allowed):
    ledger = Ledger()
    ledger.send([sent])
    ledger.end_badly(sent, error, cancelled=cancelled)
    assert (sum(ledger.errors.values()), sum(ledger.wrong.values())) == ((2, 0) if allowed else (0, 2))
    assert ledger.open == 0


def test_an_item_that_never_ends_stays_open():
    ledger = Ledger()
    ledger.send([Sent(3), Sent(2)])
    ledger.end_well(3)
    assert ledger.open == 2
