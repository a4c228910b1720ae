"""`python -m trtpool.workers.inspect` as `start` calls it: JSON in, one line of JSON out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from tests.models import ADD, BAD_MODELS, save
from trtpool.ipc.errors import ModelError
from trtpool.ipc.settings import EngineSettings, InspectRequest, ModelSource, Refusal
from trtpool.ipc.tensors import ModelSpec, TensorSpec
from trtpool.workers.inspect import inspect

pytestmark = pytest.mark.system


def ask(request: bytes, first_on_path: Path | None = None) -> dict[str, Any]:
    """The one line that the process answers `request` with, decoded; its exit code must be 0."""
    env = dict(os.environ)
    if first_on_path:
        env["PYTHONPATH"] = os.pathsep.join([str(first_on_path), env["PYTHONPATH"]])
    ended = subprocess.run(
        [sys.executable, "-m", "trtpool.workers.inspect"],
        input=request,
        capture_output=True,
        env=env,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stdout.count(b"\n") == 1
    return msgspec.json.decode(ended.stdout, type=dict[str, Any])


def request(path: Path, **engine: Any) -> bytes:
    return msgspec.json.encode(InspectRequest(ModelSource(str(path), "m"), EngineSettings(**engine)))


def test_a_model_is_answered_with_its_spec(tmp_path):
    path = save(ADD, tmp_path)
    answer = ask(request(path))
    assert [*answer] == ["spec"]
    tensors = [TensorSpec(name, "float32", (3,)) for name in ("a", "b", "sum")]
    assert msgspec.convert(answer["spec"], ModelSpec) == ModelSpec(
        "m", str(path), tuple(tensors[:2]), tuple(tensors[2:])
    )


def test_a_bad_model_is_answered_with_a_refusal(tmp_path):
    model, text = BAD_MODELS["open item"]
    answer = ask(request(save(model, tmp_path, "bad")))
    assert [*answer] == ["refusal"]
    refusal = msgspec.convert(answer["refusal"], Refusal)
    assert refusal == Refusal(ModelError.__name__, text)


def test_nothing_else_reaches_standard_output(tmp_path):
    (tmp_path / "onnxruntime.py").write_text(
        "import os\nprint('printed')\nos.write(1, b'written by native code')\nraise ImportError('broken')\n"
    )
    answer = ask(request(save(ADD, tmp_path)), first_on_path=tmp_path)
    assert answer["refusal"]["kind"] == "MissingExtra"
    assert "broken" in answer["refusal"]["text"]


def test_a_plan_for_a_gpu_goes_to_the_engine_for_it(monkeypatch):
    spec = ModelSpec("m", "/det.plan", (TensorSpec("x", "uint8", ()),), (TensorSpec("y", "uint8", ()),), 32)
    seen: list[object] = []

    class TensorrtEngine:
        def __init__(self, source: ModelSource, settings: EngineSettings) -> None:
            seen.extend([source.path, settings])
            self.spec = spec

        def close(self) -> None:
            seen.append("closed")

    module = ModuleType("trtpool.workers.tensorrt_engine")
    monkeypatch.setattr(module, "TensorrtEngine", TensorrtEngine, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert inspect(request(Path("/det.plan"), device="gpu", lanes=2)) == {"spec": spec}
    assert seen == ["/det.plan", EngineSettings(device="gpu", lanes=2), "closed"]


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"{}", b'{"source": {"path": 1}}', b"\xff", request(Path("/m"), device="tpu")]
)
def test_a_request_that_is_none_is_a_protocol_error(garbage):
    answer = inspect(garbage)
    assert [*answer] == ["refusal"]
    assert isinstance(answer["refusal"], Refusal)
    assert answer["refusal"].kind == "ProtocolError"
