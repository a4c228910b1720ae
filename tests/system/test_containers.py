"""Pool and producers in containers of their own, which share the run directory and nothing else.

A container here is what `unshare` makes: pid, mount, IPC and network namespaces, a /dev/shm of one page, and a shell
as its process 1, as container runtimes make them.  The kernel tells the broker of a peer in another pid namespace that
its pid is 0; what watches it is the pidfd that comes with the connection.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import trtpool
from tests.models import save
from tests.system.rig import (
    CLI,
    NEGATE,
    PATIENCE_S,
    Process,
    answer,
    family,
    figures,
    submit,
    wait_all_free,
    wait_until,
    watching,
)

ALICE, BOB = 54321, 54322

CONTAINER = ("unshare", "--pid", "--mount", "--ipc", "--net", "--mount-proc", "--fork", "--kill-child")
ENTER = 'mount -t tmpfs -o size=4k none /dev/shm; "$@"; exit $?'
"""What process 1 does; it stays, so that the program is another process."""


def can_make_containers() -> bool:
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        return False
    return subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or not can_make_containers(), reason="only root, and not in every sandbox, can make namespaces"
)


class Container(Process):
    """A container that runs a program; it ends with that.

    Attributes:
        host_pid: the program, as this process counts; known when it has said something.
    """

    def __init__(self, *command: str | os.PathLike[str], env: dict[str, str] | None = None):
        super().__init__(*CONTAINER, "sh", "-c", ENTER, "sh", *command, env=env)

    @property
    def host_pid(self) -> int:
        """The child of process 1."""
        init = self.init
        (program,) = wait_until(lambda: psutil.Process(init).children(), "the program runs")
        return program.pid

    @property
    def init(self) -> int:
        """Its process 1, as this process counts."""
        (init,) = wait_until(lambda: psutil.Process(self.pid).children(), "process 1 runs")
        return init.pid

    @property
    def inner_pid(self) -> int:
        """The program, as the container counts."""
        status = Path(f"/proc/{self.host_pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1])

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in this container, as `docker exec` does."""
        enter = ("nsenter", f"--target={self.init}", "--pid", "--mount", "--ipc", "--net")
        return subprocess.run([*enter, *command], capture_output=True, text=True, check=False, timeout=PATIENCE_S)


class ContainedPool(Container):
    """`trtpool start` in a container, for Alice too, ready."""

    def __init__(self, place: Path, *options: str, env: dict[str, str] | None = None):
        self.run_dir = place / "run"
        model = save(NEGATE, place, "negate")
        words = (f"--run-dir={self.run_dir}", f"--allow-user={ALICE}", "--slots=8", "--max-batch=2", "--log-level=info")
        super().__init__(*CLI, "start", model, *words, *options, env=env)
        self.wait_for_line("ready:")

    def stop(self) -> None:
        """Drain it, and see it end well."""
        os.kill(self.host_pid, signal.SIGTERM)
        self.log = self.rest(2)
        assert self.wait() == 0
        assert not self.run_dir.exists()


@pytest.fixture
def pool(place: Path) -> Iterator[ContainedPool]:
    """A pool of 8 slots; a test must leave it alive, with all slots free."""
    with ContainedPool(place) as started:
        yield started
        with trtpool.connect(run_dir=started.run_dir) as client:
            wait_all_free(client)
            assert client.status().producers == 1
        started.stop()
        wait_until(lambda: not family(started.pid), "all of it has ended")


# As in test_users: all is imported while we are root, since what Python is made of may lie where only root can read.
PRODUCER = """
    import ctypes, os, sys
    import numpy as np
    import trtpool
    from trtpool.ipc import errors

    np.full((1, 4), 5, np.float32).max()

    def wait(word):
        os.write(1, (word + os.linesep).encode())
        sys.stdin.readline()

    uid = int(sys.argv[1])
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    if sys.argv[4] == "rootless":
        ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE, which setuid took, and with it /proc/self
        assert ctypes.CDLL(None, use_errno=True).unshare(0x10000000) == 0, ctypes.get_errno()  # CLONE_NEWUSER
        with open("/proc/self/uid_map", "w") as file:
            file.write("0 %d 1" % uid)
        assert os.getuid() == 0
    try:
        pool = trtpool.connect(run_dir=sys.argv[2], transport=sys.argv[3])
        print(pool.infer(x=np.full((1, 4), 5, np.float32))["y"].max(), flush=True)
    except errors.TrtpoolError as error:
        print(type(error).__name__, error)
        sys.exit()
"""

HOLDS = """
    leased = pool.lease_many(2)
    work = pool.lease()
    work.inputs["x"][...] = 7
    done = work.submit()
    assert done.result(timeout_s=60).outputs["y"].max() == -7
    wait("holds")
    print("left")
"""


def producer(
    run_dir: Path, code: str = "", uid: int = ALICE, transport: str = "lifeline", kind: str = "plain"
) -> Container:
    """A container in which a user's process attaches, infers, says so, and does what `code` says."""
    text = textwrap.dedent(PRODUCER) + textwrap.dedent(code)
    env = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # a process with threads gets no user namespace
    return Container(sys.executable, "-c", text, str(uid), run_dir, transport, kind, env=env)


@pytest.mark.parametrize("kind", ["plain", "rootless"])
@pytest.mark.parametrize("transport", ["lifeline", "zmq"])
def test_another_user_in_another_container_works_and_leaves(transport, kind, pool):
    with producer(pool.run_dir, 'pool.close(); print("left")', transport=transport, kind=kind) as container:
        assert container.succeed() == "-5.0\nleft\n"


@pytest.mark.parametrize("transport", ["lifeline", "zmq"])
@pytest.mark.parametrize("how", ["kill -9 inside", "the container"])
def test_slots_of_a_producer_that_is_killed_in_its_container_come_back(how, transport, pool):
    with producer(pool.run_dir, HOLDS, transport=transport) as container, trtpool.connect(run_dir=pool.run_dir) as own:
        assert container.line() == "-5.0"
        assert container.line() == "holds"
        assert figures(own).free == 8 - 3
        assert container.inner_pid < 10, "it has a pid namespace of its own"
        with watching([container.host_pid]) as wait:
            if how == "the container":
                os.kill(container.init, signal.SIGKILL)
            else:
                said = container.run("sh", "-c", f"kill -9 {container.inner_pid}")
                assert said.returncode in (0, -signal.SIGKILL), said  # with the container
            wait()
        wait_all_free(own)
        assert answer(submit(own, 2)) == -2
        assert "left" not in container.rest(1)


def test_the_broker_sees_no_pid_of_theirs(place):
    """Or the tests above would show nothing."""
    with ContainedPool(place) as pool:
        with producer(pool.run_dir) as container:
            assert container.succeed() == "-5.0\n"
        pool.stop()
    assert "INFO: peer 2 is process 0" in pool.log


def test_who_is_not_allowed_is_refused_in_a_container_too(pool):
    with producer(pool.run_dir, uid=BOB) as container:
        assert container.succeed().startswith(f"AccessDenied user {BOB} may not attach to pool 'default'")


def test_a_pool_in_another_container_is_not_stopped_by_its_pid(pool):
    said = subprocess.run([*CLI, "stop", f"--run-dir={pool.run_dir}"], capture_output=True, text=True, check=False)
    assert said.returncode == trtpool.RunDirError.exit_code
    assert "runs in another container, so it cannot be signalled from here" in said.stderr
    with trtpool.connect(run_dir=pool.run_dir) as own:
        assert answer(submit(own, 2)) == -2


def test_a_pool_can_be_stopped_from_within_its_container(place):
    with ContainedPool(place) as pool:
        said = pool.run(*CLI, "stop", f"--run-dir={pool.run_dir}")
        assert (said.returncode, said.stderr) in ((0, ""), (-signal.SIGKILL, "")), said  # with the container
        assert pool.wait() == 0
        assert not pool.run_dir.exists()


def test_a_client_that_cannot_be_evicted_from_here_is_reported_and_ends_no_broker(place):
    """A process may signal its own pid namespace and those below it."""
    with ContainedPool(place, "--evict", "--recall-timeout-s=0.1") as pool:
        with producer(pool.run_dir, 'held = pool.lease_many(6); wait("holds")') as container:
            assert container.line() == "-5.0"
            assert container.line() == "holds"
            with trtpool.connect(run_dir=pool.run_dir) as own:
                with pytest.raises(trtpool.PoolBusy):
                    own.lease_many(6, timeout_s=1)
                pool.wait_for_line("is in another container and cannot be killed from here", 2)
                assert answer(submit(own, 2)) == -2
                container.say()
                assert container.wait() == 0
                wait_all_free(own)
        pool.stop()
    assert "another takes over" not in pool.log


@pytest.mark.parametrize("mode", [0o1777, 0o777])
def test_the_producer_of_the_examples_in_a_volume_as_kubernetes_makes_them(mode, place):
    """An emptyDir is open to all; docs/deploy/kubernetes.yaml makes it sticky first, and start refuses it otherwise."""
    volume = place / "volume"
    volume.mkdir()
    volume.chmod(mode)
    model = save(NEGATE, place, "negate")
    where = {"TRTPOOL_RUN_DIR": str(volume / "pool")}
    with Container(*CLI, "start", model, env=where) as pool:
        if mode == 0o777:
            assert f"could be exchanged by others, since {volume} has mode 0777" in pool.rest(2)
            assert pool.wait() == trtpool.RunDirError.exit_code
            return
        pool.wait_for_line("ready:")
        example = Path(__file__).parents[2] / "docs" / "deploy" / "producer.py"
        with Container(sys.executable, example, "--items=100", env=where) as one:
            assert one.succeed().splitlines()[-1] == "100 items came back, the end"
        with Container(sys.executable, example, env=where) as endless:
            assert "attached to pool 'default', ['negate']" in endless.line()
            os.kill(endless.host_pid, signal.SIGTERM)
            assert endless.succeed().endswith("items came back, the end\n")
        os.kill(pool.host_pid, signal.SIGTERM)
        assert pool.succeed() == ""


def test_without_peer_pidfds_whoever_cannot_be_watched_is_told_why(place, tmp_path):
    """As on kernels before 6.5: a process in another pid namespace has no pid here by which to watch it."""
    hook = "import sys\nif sys.orig_argv[-1] == 'trtpool.broker':\n    from trtpool.ipc import process\n"
    (tmp_path / "sitecustomize.py").write_text(hook + "    process.SO_PEERPIDFD = 9999\n")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    with ContainedPool(place, env={"PYTHONPATH": path}) as pool:
        with producer(pool.run_dir) as container:
            said = container.succeed()
        assert said.startswith("AccessDenied pool 'default' cannot watch your process"), said
        assert "docker run --pid=container:POOL" in said
        inside = pool.run(
            sys.executable, "-c",
            "import sys, numpy as np, trtpool\n"
            "with trtpool.connect(run_dir=sys.argv[1]) as pool:\n"
            "    print(pool.infer(x=np.ones((1, 4), np.float32))['y'].max())",
            str(pool.run_dir),
        )  # fmt: skip
        assert inside.stdout == "-1.0\n", inside.stderr
        pool.stop()
