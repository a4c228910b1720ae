"""A pool used from what Python programs are made of: executors, `multiprocessing`, threads, notebooks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.system.rig import Process

HEAD = """
import concurrent.futures as futures
import multiprocessing, sys, threading
import numpy as np
import trtpool

def infer(job):
    handle, value = job
    return handle.infer(x=np.full(4, value, "f4"))["y"][0].item()

def stream(job):
    handle, values = job
    def write(value, inputs):
        inputs["x"][...] = value
    return [(value, out.outputs["y"][0].item()) for value, out in handle.map(write, values, window=4)]

def fail(job):
    handle, values = job
    def write(value, inputs):
        inputs["x"][...] = value
    list(handle.map(write, values, model="picky"))
"""

EXECUTOR = """
if __name__ == "__main__":
    run_dir, method = sys.argv[1:]
    wanted = [-float(value) for value in range(40)]
    with trtpool.connect(run_dir=run_dir) as pool:
        handle = pool.handle()
        if method == "threads":
            executor = futures.ThreadPoolExecutor(4)
        else:
            executor = futures.ProcessPoolExecutor(2, multiprocessing.get_context(method))
        with executor:
            assert list(executor.map(infer, [(handle, value) for value in range(40)])) == wanted
            several = executor.map(stream, [(handle, range(at, at + 10)) for at in range(0, 40, 10)])
            assert [pair for part in several for pair in part] == list(zip(range(40), wanted))
            ended = futures.as_completed([executor.submit(infer, (handle, value)) for value in range(20)])
            assert sorted(future.result() for future in ended) == sorted(wanted[:20])
    print("well")
"""

MULTIPROCESSING = """
if __name__ == "__main__":
    run_dir, method = sys.argv[1:]
    context = multiprocessing.get_context(method)
    with trtpool.connect(run_dir=run_dir) as pool, context.Pool(2) as producers:
        found = producers.imap_unordered(infer, [(pool.handle(), value) for value in range(40)], chunksize=3)
        assert sorted(found) == [-float(value) for value in reversed(range(40))]
    print("well")
"""

EMBEDDED = """
if __name__ == "__main__":
    model, method = sys.argv[1:]
    with trtpool.Pool(model=model, threads=1) as pool:
        with futures.ProcessPoolExecutor(2, multiprocessing.get_context(method)) as executor:
            found = list(executor.map(infer, [(pool.handle(), value) for value in range(10)]))
    assert found == [-float(value) for value in range(10)]
    print("well")
"""

ERRORS = """
if __name__ == "__main__":
    run_dir, method = sys.argv[1:]
    with trtpool.connect(run_dir=run_dir) as pool:
        with futures.ProcessPoolExecutor(1, multiprocessing.get_context(method)) as executor:
            try:  # the table has 4 entries
                executor.submit(fail, (pool.handle(), [0, 1, 99, 2])).result()
            except trtpool.EngineFailed as error:
                print(error.index, error.item, "(item 2: 99)" in str(error), type(error.__cause__).__name__)
"""

THREADS = """
if __name__ == "__main__":
    (run_dir,) = sys.argv[1:]
    with trtpool.connect(run_dir=run_dir) as pool:
        found = []
        work = lambda at: found.extend(stream((pool, range(at, at + 25))))
        threads = [threading.Thread(target=work, args=[at]) for at in range(0, 100, 25)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [(value, -float(value)) for value in range(100)]
    print("well")
"""

NOTEBOOK = """
import nbclient, nbformat
from nbformat.v4 import new_code_cell, new_notebook

cells = '''
import numpy as np
import trtpool
pool = trtpool.Pool(model=MODEL, threads=1)
#
def write(value, inputs):
    inputs["x"][...] = value
[out.outputs["y"][0].item() for _, out in pool.map(write, range(3))]
#
[out.outputs["y"][0].item() async for _, out in pool.map(write, range(3))]
#
(await pool.map(write, [7]).__aiter__().__anext__())[1].outputs["y"].tolist()
#
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(3) as threads:
    found = list(threads.map(lambda value: pool.infer(x=np.full(4, value, "f4"))["y"][0].item(), range(3)))
found
#
pool.infer(x=np.zeros(3, "f4"))
#
pool.close()
'''.replace("MODEL", repr(sys.argv[1])).split("#")
notebook = new_notebook(cells=[new_code_cell(cell.strip()) for cell in cells])
notebook.cells[5].metadata.tags = ["raises-exception"]
nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
for cell in notebook.cells:
    for output in cell.outputs:
        print(output.get("ename") or output.data["text/plain"])
"""


def run(tmp_path: Path, code: str, *arguments: object) -> str:
    path = tmp_path / "program.py"
    path.write_text(HEAD + code)
    with Process(sys.executable, path, *map(str, arguments)) as process:
        return process.succeed()


@pytest.mark.parametrize("method", ["threads", "spawn", "forkserver"])
def test_concurrent_futures(method, small, tmp_path):
    assert run(tmp_path, EXECUTOR, small.run_dir, method) == "well\n"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_multiprocessing(method, small, tmp_path):
    assert run(tmp_path, MULTIPROCESSING, small.run_dir, method) == "well\n"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_embedded_pool_with_processes(method, negate, tmp_path):
    assert run(tmp_path, EMBEDDED, negate, method) == "well\n"


def test_an_error_in_another_process_says_which_item(pool, tmp_path):
    assert run(tmp_path, ERRORS, pool.run_dir, "spawn") == "2 None True _RemoteTraceback\n"


def test_threads(small, tmp_path):
    assert run(tmp_path, THREADS, small.run_dir) == "well\n"


@pytest.mark.filterwarnings("default")
def test_a_notebook(negate, tmp_path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    path = tmp_path / "program.py"
    path.write_text("import sys\n" + NOTEBOOK)
    env = {"IPYTHONDIR": str(tmp_path), "JUPYTER_PLATFORM_DIRS": "1"}
    with Process(sys.executable, path, negate, env=env) as program:
        answers = program.rest(1).splitlines()
        assert program.wait() == 0, program.rest(2)
    assert answers == [
        "[-0.0, -1.0, -2.0]",
        "[-0.0, -1.0, -2.0]",
        "[-7.0, -7.0, -7.0, -7.0]",
        "[-0.0, -1.0, -2.0]",
        "InvalidInput",
    ]
