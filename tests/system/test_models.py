"""Models as users have them, in real pools: each answer is onnxruntime's own, called directly."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

import trtpool
from tests.models import BFLOAT16, COUNTED, FIXED_BATCH, SHARED, VARYING, save
from tests.system.rig import StartedPool, figures, wait_all_free, wait_until, watching
from trtpool.ipc.errors import InvalidInput, WorkError

Arrays = Mapping[str, npt.NDArray[Any]]


def direct(path: Path, **arrays: npt.ArrayLike) -> Arrays:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {k: np.asarray(v) for k, v in arrays.items()}), strict=True))


def same(got: Mapping[str, Any], wanted: Arrays, at: Any = ...) -> None:
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array[at])
        assert got[name].shape == array[at].shape


def first_of(result: trtpool.Result, per_slot: int) -> Arrays:
    """Copies of a slot's outputs, of its first item."""
    return {name: (array if per_slot == 1 else array[0]).copy() for name, array in result.outputs.items()}


def items(count: int, sizes: tuple[int, int] = (1, 17), seed: int = 3) -> list[npt.NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    return [random.random((2, int(size)), np.float32) for size in random.integers(*sizes, count)]


@pytest.mark.parametrize("per_slot", [1, 3])
@pytest.mark.parametrize("transport", ["lifeline", "zmq"])
def test_items_of_several_shapes(tmp_path, run_dir, per_slot, transport):
    path = save(VARYING, tmp_path, "varying")
    options: dict[str, Any] = {"shape": "x=2x1..16", "items_per_slot": per_slot, "max_batch": 6, "workers": 2}
    with StartedPool(path, run_dir=run_dir, **options) as pool:
        assert "x float32 (N, 2, 1 to 16) -> y float32 (N, 2, 0 to 16), s float32 (N, 0 to 16)" in pool.announced
        with pool.connect(transport) as client:
            for size in (1, 7, 16):
                x = np.random.default_rng(size).random((11, 2, size), np.float32)
                same(client.infer(x=x), direct(path, x=x))
            (one,) = items(1)
            same(client.infer(x=one), direct(path, x=one[None]), 0)

            def write(item: npt.NDArray[np.float32], inputs: Any) -> int:
                inputs.shaped("x", item.shape)[...] = item  # one that fills the slot, if that holds several
                return 1

            for item, result in client.map(write, items(100)):
                same(first_of(result, per_slot), direct(path, x=item[None]), 0)
            wait_all_free(client)
            assert figures(client).items == 34 + 100


def test_leases_have_the_largest_shape_until_they_are_given_another(tmp_path, run_dir):
    path = save(VARYING, tmp_path, "varying")
    with StartedPool(path, run_dir=run_dir, shape="x=2x1..16") as pool, pool.connect() as client:
        with client.lease() as slot:
            assert slot.inputs["x"].shape == (2, 16)
            view = slot.inputs.shaped("x", (2, 5))
            assert view.flags.c_contiguous
            view[...] = 1
            assert slot.inputs["x"].shape == (2, 5)
            with pytest.raises(InvalidInput, match=r"takes items of \(2, 1 to 16\), got \(2, 17\)"):
                slot.inputs.shaped("x", (2, 17))
            result = slot.submit().result(timeout_s=60)
            assert (result.outputs["y"] == np.full((2, 5), -1)).all()
            with pytest.raises(InvalidInput, match="'y' is an output"):
                result.outputs["y"] = np.zeros((2, 5), np.float32)
        with client.lease_many(3) as leases:
            slots = leases.slots()
            for size, slot in enumerate(slots, 1):
                slot.inputs["x"] = np.full((2, size), size, np.float32)
            work = [slot.submit() for slot in slots]
            assert [one.result(timeout_s=60).outputs["s"].tolist() for one in work] == [[2], [4, 4], [6, 6, 6]]
            for slot in slots:
                slot.release()
        with client.lease_many(2) as leases:
            (run,) = leases
            run.inputs["x"] = np.ones((2, 2, 4), np.float32)
            assert run.submit().result(timeout_s=60).outputs["s"].shape == (2, 4)
        for bad in (np.zeros((2, 17), np.float32), np.zeros((2, 0), np.float32), np.zeros((3, 4), np.float32)):
            with pytest.raises(InvalidInput, match="must have shape"):
                client.infer(x=bad)


def test_shapes_outlive_a_broker(tmp_path, run_dir):
    path = save(VARYING, tmp_path, "varying")
    options: dict[str, Any] = {"shape": "x=2x1..16", "max_batch": 2, "slots": 16}
    with StartedPool(path, run_dir=run_dir, **options) as pool, pool.connect() as client:
        given = items(6)
        with pool.stopped_worker():
            work = []
            for item in given:
                lease = client.lease()
                lease.inputs["x"] = item
                work.append(lease.submit())
            wait_until(lambda: figures(client).queued + figures(client).running == 6, "it waits", client.status)
            with watching([pool.broker]) as wait:
                os.kill(pool.broker, signal.SIGKILL)
                wait()
        for item, one in zip(given, work, strict=True):
            with one.result(timeout_s=60) as result:
                same(result.outputs, direct(path, x=item[None]), 0)
        assert client.status().epoch == 2
        wait_all_free(client)


def test_an_input_that_a_batch_shares(tmp_path, run_dir):
    path = save(SHARED, tmp_path, "shared")
    with StartedPool(path, run_dir=run_dir) as pool, pool.connect() as client:
        random = np.random.default_rng(4)
        x, b = random.random((9, 3), np.float32), random.random((2, 3), np.float32)
        for k in (2, 3):
            factor = np.float32(k)
            same(client.infer(x=x, k=factor, b=b), direct(path, x=x, k=factor, b=b))

        def write(number: int, inputs: Any) -> None:
            inputs["x"], inputs["k"], inputs["b"] = x[number % 9], np.float32(number // 4 % 3), b

        for number, result in client.map(write, range(50)):
            wanted = direct(path, x=x[number % 9][None], k=np.float32(number // 4 % 3), b=b)
            same(result.outputs, wanted, 0)
        with client.lease_many(2) as leases:
            (run,) = leases
            run.inputs["k"][...] = [1, 2]
            with pytest.raises(InvalidInput, match=r"differ in input 'k'.* or use .slots\(\)"):
                run.submit()


def test_batches_of_one_size_are_filled_up(tmp_path, run_dir):
    path = save(FIXED_BATCH, tmp_path, "fixed")
    with StartedPool(path, run_dir=run_dir) as pool, pool.connect() as client:
        assert client.models[0].max_batch == 20
        x = np.random.default_rng(5).random((47, 4), np.float32)
        assert (client.infer(x=x)["y"] == -x).all()


def test_batches_of_one_size_or_none(tmp_path, run_dir):
    path = save(FIXED_BATCH, tmp_path, "fixed")
    with StartedPool(path, run_dir=run_dir, partial_batches="refuse") as pool, pool.connect() as client:
        assert client.models[0].items_per_slot == 20
        x = np.random.default_rng(5).random((40, 4), np.float32)
        assert (client.infer(x=x)["y"] == -x).all()
        with pytest.raises(InvalidInput, match="takes batches of 20 only"):
            client.infer(x=x[:30])
        wait_all_free(client)


def test_no_batch_and_an_output_whose_size_depends_on_the_data(tmp_path, run_dir):
    path = save(COUNTED, tmp_path, "counted")
    pool = trtpool.Pool(path, run_dir=run_dir, shapes={"x": ((1, 8),), "y": (5,)}, no_batch=["counted"])
    with pool:
        for x in ([1, 0, 2], [0], [5] * 5):
            same(pool.infer(x=np.array(x, np.float32)), direct(path, x=np.array(x, np.float32)))
        with pytest.raises(WorkError, match="--shape y="):
            pool.infer(x=np.ones(8, np.float32))
        with pytest.raises(InvalidInput, match="another shape for each item"):
            pool.infer(x=np.array([[1, 0], [1, 1]], np.float32))
        assert pool.infer(x=np.array([[1, 0], [0, 1]], np.float32))["y"].tolist() == [[0], [1]]


def test_dtypes_that_numpy_has_not(tmp_path, run_dir):
    path = save(BFLOAT16, tmp_path, "bf")
    with StartedPool(path, run_dir=run_dir) as pool, pool.connect() as client:
        x = np.linspace(-4, 4, 44).reshape(11, 4).astype(ml_dtypes.bfloat16)
        got = client.infer(x=x)
        assert (got["y"].dtype, got["z"].dtype) == (ml_dtypes.bfloat16, ml_dtypes.float8_e5m2)
        np.testing.assert_array_equal(got["y"], x)
        np.testing.assert_array_equal(got["z"], x.astype(np.float32).astype(ml_dtypes.float8_e5m2))
