"""Which model files are taken, by owner and mode; the same for ONNX files and plans, and for each way to load one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.models import ADD, save
from tests.workers.fake_cuda import FakeRuntime
from tests.workers.fake_tensorrt import installed, make_module, neg, write_plan
from trtpool.ipc.errors import ModelError
from trtpool.ipc.settings import EngineSettings, ModelSource
from trtpool.workers import build_onnx, onnx_model
from trtpool.workers.cuda import Cuda
from trtpool.workers.plans import Plan

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")

SOMEONE = 12345


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory on the way to which there is nothing that others may write to, but /tmp."""
    with tempfile.TemporaryDirectory(prefix="trt", dir="/tmp") as found:
        yield Path(found)


def a_plan(folder: Path) -> Path:
    write_plan(folder / "a.plan", *neg())
    return folder / "a.plan"


def an_onnx_file(folder: Path) -> Path:
    return save(ADD, folder, "a")


def load_plan(path: Path, *, host_code: bool = False) -> None:
    runtime = FakeRuntime()
    with installed(make_module("tensorrt", runtime, "")):
        Plan(ModelSource(str(path), "a"), EngineSettings(host_code=host_code), Cuda(runtime))


def load_onnx(path: Path) -> None:
    onnx_model.load(path, 1)


def load_to_build(path: Path) -> None:
    build_onnx.load(path)


WAYS = [(a_plan, load_plan), (an_onnx_file, load_onnx), (an_onnx_file, load_to_build)]
Make = Callable[[Path], Path]
Load = Callable[..., None]


@pytest.fixture(params=WAYS, ids=lambda way: way[1].__name__)
def way(request: pytest.FixtureRequest) -> tuple[Make, Load]:
    way: tuple[Make, Load] = request.param
    return way


@pytest.mark.parametrize("mode", [0o602, 0o666, 0o777, 0o646])
def test_a_file_that_everybody_may_write_is_refused(mode, way, place):
    make, load = way
    path = make(place)
    load(path)
    path.chmod(mode)
    with pytest.raises(ModelError, match=rf"has mode {mode:04o}, so others could .* run: chmod go-w {path}, or serve"):
        load(path)
    path.chmod(mode & ~0o022)
    load(path)


@as_root
def test_a_file_that_a_group_may_write_is_refused_unless_it_is_our_own(way, place):
    make, load = way
    path = make(place)
    path.chmod(0o664)
    load(path)
    os.chown(path, -1, SOMEONE)
    with pytest.raises(ModelError, match="has mode 0664, so others could have changed it"):
        load(path)


def test_the_file_counts_and_not_a_link_to_it(way, place):
    make, load = way
    path = make(place)
    link = place / f"link{path.suffix}"
    link.symlink_to(path)
    load(link)
    path.chmod(0o666)
    with pytest.raises(ModelError, match=f"{link} has mode 0666"):
        load(link)


@as_root
def test_the_owner_may_be_anybody(way, place):
    """Such as the user of a build, whose files a container's root serves."""
    make, load = way
    path = make(place)
    os.chown(path, SOMEONE, SOMEONE)
    load(path)


@as_root
def test_what_may_run_code_must_be_ours_or_roots(place):
    path = a_plan(place)
    load_plan(path, host_code=True)
    os.chown(path, SOMEONE, -1)
    with pytest.raises(ModelError, match="belongs to uid 12345, and with --allow-host-code a plan must be yours or"):
        load_plan(path, host_code=True)


def test_what_may_run_code_must_lie_where_nobody_could_exchange_it(place):
    folder = place / "open"
    folder.mkdir()
    path = a_plan(folder)
    folder.chmod(0o777)
    load_plan(path)
    (place / "link.plan").symlink_to(path)
    for name in (path, place / "link.plan"):
        with pytest.raises(ModelError, match=f"plan {path} could be exchanged by others, since {folder} has mode 0777"):
            load_plan(name, host_code=True)
