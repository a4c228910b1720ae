"""What the commands tell of a pool on a real GPU, and what they change in it."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import trtpool
from tests.gpu.zoo import Samples, Zoo
from tests.models import save
from tests.system.rig import CLI, PATIENCE_S, Process, StartedPool
from tests.system.test_metrics import get, sample, url_of
from tests.trace_check import check

DIFFERENT = 23
"""The exit code of `trtpool check` for answers that differ."""

pytestmark = [pytest.mark.gpu, pytest.mark.system, pytest.mark.timeout(300)]


def command(*words: object, code: int = 0) -> str:
    """Run ``trtpool WORDS``; returns standard output."""
    ended = subprocess.run([*CLI, *map(str, words)], capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture
def mlp(zoo: Zoo, tmp_path: Path) -> Iterator[StartedPool]:
    """A pool of the mlp alone."""
    with StartedPool(zoo.plan("mlp"), run_dir=tmp_path / "run", gpus=0, slots=512, metrics="127.0.0.1:0") as pool:
        yield pool


def stream(client: trtpool.Client, samples: Samples, count: int) -> None:
    """Send items in order, and check each answer."""

    def write(item: int, inputs: Any) -> None:
        inputs["x"][...] = samples.inputs[item % len(samples.inputs)]

    done = 0
    for item, result in client.map(write, range(count), model="mlp", window=64):
        (output,) = result.outputs.values()
        samples.check([item % len(samples.inputs)], output[None])
        done += 1
    assert done == count


@contextlib.contextmanager
def streaming(client: trtpool.Client, samples: Samples) -> Iterator[None]:
    """Send items all the while; at the end some were sent, and all answers were right."""
    ended = threading.Event()

    def work() -> int:
        done = 0
        while not ended.is_set():
            stream(client, samples, 100)
            done += 100
        return done

    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(work)
        try:
            yield
        finally:
            ended.set()
        assert future.result(PATIENCE_S) > 0


# --- Profile -------------------------------------------------------------------------------------


def test_a_profile_adds_up(zoo):
    report = json.loads(
        command("profile", zoo.plan("reduce1600x2560"), "--gpus=0", "--batch=1,4", "--seconds=0.3", "--json")
    )
    measured = report["measured"]
    assert "NVIDIA" in measured["device"]
    top = max(measured["bus"], key=lambda point: point["size"])
    bus = top["size"] / top["in_ns"]  # GB/s
    assert 2 < bus < 500
    for batch, items in zip(measured["batches"], (1, 4), strict=True):
        assert (batch["items"], batch["in_bytes"]) == (items, items * 3 * 1600 * 2560 * 4)
        series = {name: one["median_ns"] for name, one in batch["series"].items()}
        assert all(one > 0 for one in series.values())
        parts = series["copy_in"] + series["compute"] + series["copy_out"]
        assert 0.8 * parts < series["end_to_end"] < 1.5 * parts
        assert 0.3 * bus < batch["in_bytes"] / series["copy_in"] < 1.3 * bus
        assert batch["pageable"]["end_to_end"]["median_ns"] > series["end_to_end"], "pageable memory is slower"
        most = max(batch["overlaps"], key=lambda one: one["lanes"])
        assert most["lanes"] > 1
        assert most["elapsed_ns"] / most["batches"] < 1.2 * series["end_to_end"]
    words = json.dumps(report["advice"])
    assert "transfer-bound" in words


def test_a_profile_in_words_and_as_a_page(zoo, tmp_path):
    page = tmp_path / "report.html"
    text = command("profile", zoo.plan("mlp"), "--gpus=0", "--batch=1,64", "--seconds=0.1", "--html", page)
    assert "copy in" in text
    assert "GB/s" in text
    assert "<svg" in page.read_text()


# --- A pool's figures ----------------------------------------------------------------------------


def test_metrics_and_top_name_the_gpu(mlp, zoo):
    samples = zoo.samples("mlp")
    with mlp.connect() as client:
        stream(client, samples, 500)
        code, text = get(url_of(mlp))
        screen = command("top", "--once", f"--run-dir={mlp.run_dir}")
    assert code == 200
    assert sample(text, "trtpool_items_total", model="mlp", gpu="0") == 500
    assert sample(text, "trtpool_copied_bytes_total", model="mlp", gpu="0", direction="in") == 500 * 1024
    for phase in ("copy_in", "compute", "copy_out"):
        assert sample(text, f"trtpool_{phase}_seconds_sum", model="mlp", gpu="0") > 0
    (line,) = [line for line in screen.splitlines() if "gpu 0" in line]
    assert re.search(r" [\d.]+/[\d.]+G$", line), f"NVML tells of its memory: {line}"


def test_a_trace_has_a_track_for_each_lane(mlp, zoo, tmp_path):
    output = tmp_path / "trace.json"
    with mlp.connect() as client, streaming(client, zoo.samples("mlp")):
        command("trace", f"--run-dir={mlp.run_dir}", "--seconds=0.5", f"--output={output}")
    traced = check(output)
    names = {event["name"] for event in traced.slices("device")}
    assert {"copy in", "compute", "copy out"} <= names
    (worker,) = mlp.pids("trtpool.workers")
    assert len([track for track in traced.tracks(worker) if "lane" in track]) >= 2


def test_results_have_the_times_of_their_copies(mlp, zoo):
    samples = zoo.samples("mlp")
    with mlp.connect() as client, client.lease() as slot:
        slot.inputs["x"][...] = samples.inputs[0]
        result = slot.submit().result(timeout_s=PATIENCE_S)
        times = result.timings
        assert min(times.copy_in_ns, times.compute_ns, times.copy_out_ns) > 0
        assert times.copy_in_ns + times.compute_ns + times.copy_out_ns < times.total_ns
        del result


# --- Reload --------------------------------------------------------------------------------------


def test_reload_under_load_loses_nothing(mlp, zoo, tmp_path):
    samples, plan = zoo.samples("mlp"), tmp_path / "again.plan"
    plan.write_bytes(zoo.plan("mlp").read_bytes())
    old = set(mlp.pids("trtpool.workers"))
    with mlp.connect() as client:
        with streaming(client, samples):
            said = command("reload", f"mlp={plan}", f"--run-dir={mlp.run_dir}")
        assert "generation 1" in said
        assert old.isdisjoint(mlp.pids("trtpool.workers"))
        stream(client, samples, 100)


def test_a_plan_of_another_signature_is_refused(mlp, zoo):
    with Process(*CLI, "reload", f"mlp={zoo.plan('reduce1600x2560')}", f"--run-dir={mlp.run_dir}") as refused:
        assert refused.wait() == trtpool.ModelError.exit_code
        assert "256" in refused.rest(2)
    with mlp.connect() as client:
        stream(client, zoo.samples("mlp"), 50)


# --- Pixels normalised inside the engine ---------------------------------------------------------

CLASSIFY = (
    "g (float[N,3,H,W] x) => (float[N,6] y) "
    "{ s = GlobalAveragePool(x) f = Flatten(s) n = Neg(f) y = Concat<axis=1>(f, n) }"
)


def test_a_plan_that_normalises_is_checked_against_its_model(zoo, tmp_path):
    model = save(CLASSIFY, tmp_path, "classify")
    photos = tmp_path / "photos"
    photos.mkdir()
    random = np.random.default_rng(7)
    for number in range(12):
        pixels = random.integers(0, 256, (32, 48, 3), np.uint8) // (1 + number % 3) + 10 * number
        Image.fromarray(pixels.astype(np.uint8)).save(photos / f"{number}.png")
    options = ("--optimization-level=0", "--shapes=x=1x3x32x48:4x3x32x48:8x3x32x48")
    plan = zoo.built(model, "--normalize=imagenet", *options)
    words = ("check", plan, "--against", model, "--data", photos, "--gpus=0", "--shape=x=3x32x48", "--json")
    report = json.loads(command(*words))
    assert report["ok"]
    (y,) = report["outputs"]
    assert y["top1"] == 1
    assert y["max_error"] < 1e-2
    # The record beside the plan says how its pixels are normalised; told otherwise, the reference answers otherwise.
    other = json.loads(command(*words, "--normalize=mean=0.1,0.9,0.1,std=1,1,1", code=DIFFERENT))
    assert not other["ok"]


def test_the_doctor_finds_the_gpu_in_order():
    shown = subprocess.run([*CLI, "doctor"], capture_output=True, text=True, check=False).stdout
    text = " ".join(shown.split())  # its lines are broken anywhere
    assert "GPU 0: NVIDIA" in text
    assert "GPU 0: shared memory can be pinned" in text
