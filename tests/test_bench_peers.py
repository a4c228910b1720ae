"""`scripts/bench_peers.py`: its arithmetic, and the contestants that need nothing but Python itself."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from rich.console import Console
from scripts.benchlib.workload import Array
from scripts.peerlib import cli, host, http, iceoryx, local, processes, report, rounds
from scripts.peerlib.contestant import Connects, Contestant, Measured
from scripts.peerlib.job import KINDS, Job
from scripts.peerlib.results import Ratio, Row, Table, ratio
from scripts.peerlib.roster import CONTESTANTS
from scripts.peerlib.rounds import LATENCY, SHARED, Options, Outcome

NUMPY_ONLY = ("ring", "queue", "executor")


def row(name: str, *rates: float | None, own: bool = False, bar: bool = True) -> Row:
    """Windows of a second; each item costs a millisecond of CPU."""
    return Row(name, own, bar, [None if rate is None else Measured(int(rate), 1.0, rate / 1000) for rate in rates])


# --- Figures and ratios ---------------------------------------------------------------------------


def test_figures_are_of_each_window():
    one = Row("one", windows=[Measured(200, 2.0, 0.5), None, Measured(0, 2.0, 0.5)])
    assert one.figure("items/s").values == (100.0, None, None)
    assert one.figure("CPU s").values == (2.5, None, None)
    assert one.figure("items/s").median == 100.0
    assert row("none", None).figure("items/s").median is None


def test_latencies_are_percentiles_in_microseconds():
    one = Row("one", windows=[Measured(101, 1.0, 0.1, tuple(1000 * n for n in range(101)))])
    assert (one.figure("p50 us").median, one.figure("p99 us").median) == (50.0, 99.0)


def test_the_least_share_is_that_of_the_window_and_is_shown_where_there_are_several_producers():
    assert Row("one", windows=[Measured(100, 1.0, 0.1, least_share=0.25)]).figure("least share").values == (0.25,)
    shown_by = {(one.kind, one.producers): "least share" in one.figures for one in rounds.tables(tuple(KINDS))}
    assert shown_by == {
        ("images", 1): False, ("images", 4): True, ("small", 1): False, ("small", 4): True, ("latency", 0): False
    }  # fmt: skip


def test_ratios_are_to_the_best_of_the_same_round_and_skip_failed_rounds():
    own = row("trtpool", 300, 300, None, 300)
    found = ratio("items/s", own, [row("a", 100, 10, 100, None), row("b", 10, 150, 100, None)])
    assert found == Ratio((3.0, 2.0))
    assert ratio("items/s", own, [row("a", None, None, None, None)]) is None
    assert ratio("items/s", own, []) is None


def test_a_lower_latency_is_so_many_times_better():
    fast, slow = (Row(name, windows=[Measured(1, 1.0, 0.0, (ns,))]) for name, ns in (("fast", 100), ("slow", 400)))
    assert ratio("p50 us", fast, [slow]) == Ratio((4.0,))


@pytest.mark.parametrize(("value", "even"), [(1.29, True), (1.31, False), (0.78, True), (0.76, False)])
def test_ratios_that_the_machine_makes_by_itself_are_even(value: float, even: bool):
    assert Ratio((value,)).even is even


def test_every_round_has_each_contestant_once_for_each_kind_in_an_order_of_its_own():
    options = Options(rounds=3, window_s=1.0, seed=7, kinds=("images", "small"))
    names = [f"c{n}" for n in range(8)]
    planned = list(rounds.plan(names, options))
    assert planned == list(rounds.plan(names, options))
    turns = [[name for turn, kind, name in planned if (turn, kind) == (n, k)] for n in range(3) for k in options.kinds]
    assert all(sorted(turn) == names for turn in turns)
    assert len({tuple(turn) for turn in turns}) == len(turns)


# --- Report ---------------------------------------------------------------------------------------


def full_outcome() -> Outcome:
    """Two rounds, of which one contestant failed the second, and one both."""
    images = Table("images", "images", 4, SHARED)
    for one in (row("trtpool", 300, 330, own=True), row("ring", 250, 300), row("ring-64", 9000, 9000, bar=False),
                row("mosec", 30, None), row("litserve", None, None)):  # fmt: skip
        images.rows[one.name] = one
    latency = Table("one at a time", "latency", 0, LATENCY)
    latency.rows["ring"] = Row("ring", windows=[Measured(2, 1.0, 0.1, (1000, 3000))] * 2)
    return Outcome([images, latency], {"triton": "no module pytriton"}, {("images", "mosec"): "it ended with -9"})


def shown(outcome: Outcome) -> str:
    out = io.StringIO()
    report.show(Console(file=out, width=report.WIDTH), outcome, CONTESTANTS)
    return out.getvalue()


def test_the_table_has_ratios_and_says_which_are_even():
    text = shown(full_outcome())
    assert "300 - 330" in text
    assert "1.15 (1.1 - 1.2), even" in text
    assert "(ring-64)" in text
    assert "1.00 (1.00 - 1.00)" in text
    assert "trtpool over the best peer, items/s: 1.15 (1.1 - 1.2), even" in text
    assert "failed" in text
    assert "…" not in text


def test_who_is_missing_or_failed_is_said_with_the_reason_and_beside_triton_whose_its_copies_are():
    text = shown(full_outcome())
    assert "missing: triton: no module pytriton" in text
    assert "FAILED: mosec at images: it ended with -9" in text
    assert "three of its four copies, the producer's write being the first, are its Python backend's" in " ".join(
        text.split()
    )


def test_all_is_in_the_json():
    kept = json.loads(json.dumps(report.as_dict(full_outcome(), Options(2, 1.0, 1), CONTESTANTS)))
    images = {one["name"]: one for one in kept["tables"][0]["rows"]}
    assert images["mosec"]["figures"]["items/s"] == [30.0, None]
    assert images["ring"]["times_better"]["trtpool"] == [1.2, 1.1]
    assert kept["failed"] == [{"kind": "images", "name": "mosec", "why": "it ended with -9"}]


def test_each_contestant_says_how_often_it_copies_and_why():
    assert len(CONTESTANTS) == 17
    for name, one in CONTESTANTS.items():
        assert (one.name, one.copies >= 0, bool(one.why)) == (name, True, True)
        assert set(one.kinds) <= set(KINDS)


# --- Contestants ----------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Small items for NumPy, which needs no model file."""
    return Job(KINDS["small"], tmp_path / "none.onnx", "numpy", tmp_path)


@pytest.fixture
def survivors() -> Callable[[], list[str]]:
    """What is below this process and was not when the test began, such as a pool that other tests share."""
    before = {one.pid for one in processes.below(os.getpid())}
    return lambda: [
        one.name
        for one in processes.below(os.getpid())
        if not one.ended and one.pid not in before and "resource_tra" not in command(one.pid)
    ]


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_a_contestant_starts_works_and_stops(name: str, job: Job, survivors):
    with host.guest(CONTESTANTS[name](), job) as up:
        measured = up.run(2, 0.5)
    assert measured.items > 0
    assert 0 < measured.least_share <= 1
    assert measured.took_s >= 0.5
    assert measured.cpu_s > 0
    assert survivors() == []


class Lazy(local.Ring):
    """A ring whose first producer does a quarter of what the second does."""

    name = "lazy"

    @contextlib.contextmanager
    def producers(self, job: Job, count: int) -> Iterator[Connects]:
        assert count == 2
        yield [partial(Does, 100), partial(Does, 400)]


class Does:
    """A driver that reports so many items."""

    def __init__(self, items: int) -> None:
        self._items = items

    def run(self, until_s: float) -> int:
        time.sleep(max(0.0, until_s - time.monotonic()))
        return self._items

    def exchange(self, items: Array, expected: npt.NDArray[np.float64]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to close."""


def test_the_least_share_is_of_an_equal_one(job: Job):
    with host.guest(Lazy(), job) as up:
        measured = up.run(2, 0.1)
    assert (measured.items, measured.least_share) == (500, 0.4)


class Queued:
    """A subscriber with so many samples of one producer, who refills it while somebody is at it."""

    def __init__(self, producer: int, samples: int, refills: int = 0) -> None:
        self._producer, self._samples, self._refills = producer, samples, refills

    def receive(self) -> int | None:
        if not self._samples:
            return None
        if self._refills:
            self._refills -= 1
        else:
            self._samples -= 1
        return self._producer


def test_samples_of_iceoryx2_are_taken_in_turn_so_that_one_producer_does_not_keep_others_waiting():
    turn = iceoryx.SAMPLES_A_TURN
    taken = list(iceoryx._in_turn([Queued(0, 1, refills=3 * turn - 1), Queued(1, 3), Queued(2, 0)]))
    assert taken == turn * [0] + 3 * [1] + 2 * turn * [0]


def test_one_item_at_a_time_is_timed_each(tmp_path: Path):
    with host.guest(local.Ring(), Job(KINDS["latency"], tmp_path / "none.onnx", "numpy", tmp_path)) as up:
        measured = up.latency(0.2)
    assert len(measured.took_ns) == measured.items > 0
    assert sum(measured.took_ns) <= 1e9 * measured.took_s


class Wrong(local.Ring):
    """A ring that fails in one way; an inner class could not be pickled."""

    name = "wrong"

    def __init__(self, how: str) -> None:
        self.how = how

    def start(self, job: Job) -> None:
        if self.how == "exit":
            os._exit(3)
        if self.how == "hang":
            time.sleep(600)
        if self.how == "raise":
            raise ValueError("no such port")
        super().start(job)

    def stop(self) -> None:
        if self.how == "leave":
            # Two processes away and in a session of its own, as daemons are.
            middle = "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)"
            subprocess.run([sys.executable, "-c", middle], check=True)
        super().stop()


@pytest.mark.parametrize(
    ("how", "said"),
    [("exit", "ended with 3 when it was to start"), ("hang", "did not start within"), ("raise", "no such port"),
     ("leave", r"left processes behind: sleep \(")],
)  # fmt: skip
def test_what_goes_wrong_is_said_and_leaves_nothing_behind(how: str, said: str, job: Job, monkeypatch, survivors):
    if how == "hang":  # the others must be heard out, however slow the machine
        monkeypatch.setattr(host, "START_S", 3.0)
    monkeypatch.setattr(host, "LINGER_S", 1.0)
    with pytest.raises(host.ContestantFailed, match=said), host.guest(Wrong(how), job):
        pass
    assert survivors() == []


class Absent(Contestant):
    name = "absent"
    modules = ("trtpool_no_such_module",)
    copies = 0
    why = "none"

    def producers(self, job, count):
        raise NotImplementedError


class Broken(Wrong):
    name = "broken"

    def __init__(self) -> None:
        super().__init__("raise")


def test_those_that_are_missing_or_fail_do_not_keep_the_others_from_their_turns():
    entered = {"absent": Absent, "broken": Broken, "ring": local.Ring}
    options = Options(rounds=2, window_s=0.2, seed=1, kinds=("latency",))
    outcome = rounds.run(entered, options)
    assert "pip install" in outcome.missing["absent"]
    assert list(outcome.failed) == [("latency", "broken")]
    (table,) = outcome.tables
    assert list(table.rows) == ["broken", "ring"]
    assert table.rows["broken"].windows == [None, None]
    assert all(window is not None and window.items for window in table.rows["ring"].windows)


class Leaving(Wrong):
    """Leaves a process behind each time that it stops."""

    name = "leaving"

    def __init__(self) -> None:
        super().__init__("leave")


class Fading(local.Ring):
    """Has a window with one producer, and none with four."""

    name = "fading"

    def run(self, producers: int, window_s: float) -> Measured:
        if producers > 1:
            raise ValueError("too many")
        return super().run(producers, window_s)


def test_what_was_measured_before_a_failure_stands(monkeypatch, survivors):
    monkeypatch.setattr(host, "LINGER_S", 0.3)
    entered = {"leaving": Leaving, "fading": Fading}
    outcome = rounds.run(entered, Options(rounds=2, window_s=0.2, seed=1, kinds=("small",)))
    assert "left processes behind: sleep" in outcome.failed["small", "leaving"]
    assert "too many" in outcome.failed["small", "fading"]
    assert outcome.gave_up == {("small", "fading")}
    one, four = ([[window is not None for window in row.windows] for row in t.rows.values()] for t in outcome.tables)
    assert one == [[True, True], [True, False]]
    assert four == [[True, True], [False, False]]
    assert survivors() == []


def burn(seconds: float) -> None:
    """Use so much CPU time in a grandchild that ends, and is reaped by its own parent."""
    code = f"import time\nwhile time.process_time() < {seconds}: pass"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cpu_time_of_processes_that_have_ended_is_counted():
    before_s = processes.cpu_s()
    child = multiprocessing.get_context("spawn").Process(target=burn, args=(0.3,))
    child.start()
    child.join()
    assert processes.cpu_s() - before_s >= 0.28


# --- HTTP -----------------------------------------------------------------------------------------


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200 if self.path == "/echo" else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def test_connections_are_kept_and_bodies_of_any_size_arrive_whole():
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            with contextlib.closing(http.Connection(port, "/echo")) as one:
                for size in (0, 1, 5_000_000):
                    body = os.urandom(size)
                    one.send(body)
                    assert one.receive() == body
            with contextlib.closing(http.Connection(port, "/full")) as one:
                one.send(b"no")
                with pytest.raises(ValueError, match=r"503.*no"):
                    one.receive()
        finally:
            server.kill()


# --- Command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--only", "ring,rong"], "no rong; there are trtpool, "), (["--kinds", "medium"], "there are images, small"),
     (["--json", "/nonsense/x.json"], "is not a directory")],
)  # fmt: skip
def test_what_is_wrong_on_the_command_line_is_answered_with_what_is_right(arguments, said):
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())


def test_the_script_runs_as_a_file_and_writes_json(tmp_path: Path):
    script = Path(__file__).resolve().parent.parent / "scripts" / "bench_peers.py"
    kept = tmp_path / "kept.json"
    command: list[str | Path] = [
        sys.executable,
        script,
        "--quick",
        "--only",
        "ring",
        "--kinds",
        "latency",
        "--json",
        kept,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    (table,) = json.loads(kept.read_text())["tables"]
    assert table["rows"][0]["name"] == "ring"
    assert table["rows"][0]["medians"]["p50 us"] > 0
