"""Models with settings of their own, as programs give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import trtpool
from tests.models import MODELS, save
from trtpool.broker.planning import lay_out, requests
from trtpool.broker.pool import make_settings
from trtpool.ipc.settings import ModelTerms, PoolSettings
from trtpool.ipc.tensors import ModelSpec, TensorSpec


def settings(*models: Any, **options: Any) -> PoolSettings:
    return make_settings(models, Path("/run/p"), **options)


@pytest.mark.parametrize("kind", [trtpool.Model, dict])
def test_settings_of_one_model(kind):
    det = kind(path=Path("/m/det.onnx"), slots=3, weight=2, shapes={"x": (3, (4, 8))})
    chosen = settings(det, kind(path="/m/r.onnx", name="rec", max_batch=16), "/m/cls.onnx", slots=9, max_delay_us=7)
    assert [model.name for model in chosen.models] == ["det", "rec", "cls"]
    assert [chosen.for_model(name).slots for name in ("det", "rec", "cls")] == [3, 9, 9]
    assert chosen.terms_of("det") == ModelTerms(7, 0, 2)
    assert [request.engine.shapes for request in requests(chosen)] == [{"x": (3, (4, 8))}, {}, {}]


def test_the_arena_is_laid_out_by_them():
    chosen = settings({"path": "/det.onnx", "slots": 5}, {"path": "/rec.onnx", "max_batch": 4, "items_per_slot": 2})
    tensors = (TensorSpec("x", "float32", (8,)),), (TensorSpec("y", "float32", ()),)
    det, rec = lay_out(chosen, [ModelSpec(name, "/m", *tensors) for name in ("det", "rec")]).models
    assert (det.slots, det.items_per_slot, det.max_batch) == (5, 1, 8)
    assert (rec.slots, rec.items_per_slot, rec.max_batch) == (4096, 2, 4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"path": "a", "slot": 1}, r"no setting 'slot', did you mean 'slots'\?; there are path, name, shapes, slots,"),
        ({"path": "a", "slots": 0}, "model 'a': slots=0 is not possible: Expected int >= 1$"),
        ({"path": "a", "weight": "high"}, "model 'a': weight='high' is not possible: Expected int, got str$"),
        ({"path": "a", "weight": 1001}, "model 'a': weight=1001 is not possible: Expected int <= 1000$"),
        ({"slots": 1}, "a model needs a path, the name of its file, and has None"),
        ({"path": "a", "name": 3}, "model a: its name must be a string, and is 3"),
        ({"path": "a", "shapes": 3}, "model 'a': shapes=3 is not possible: give item shapes by input name"),
        ({"path": "a", "shapes": {"x": (0,)}}, "shapes={'x': .*} is not possible"),
        ({"path": "a", "shapes": {"x": (3, (1, 2, 3))}}, "is not possible: .* or {'x': .*} where items differ"),
        ({"path": "a", "max_batch": 1, "items_per_slot": 2}, "model 'a': --max-batch 1 is smaller than --items-per-sl"),
    ],
)
def test_what_a_model_cannot_have_is_one_sentence(given, words):
    with pytest.raises(trtpool.ConfigError, match=words):
        settings(given)


@pytest.mark.system
def test_a_pool_of_two_models(tmp_path):
    mean, mlp = (save(MODELS[name].model, tmp_path, name) for name in ("mean", "mlp"))
    first, second = trtpool.Model(mean, slots=8, weight=3), {"path": mlp, "name": "net", "slots": 24, "max_batch": 2}
    with trtpool.Pool([first, second]) as pool:
        figures = {model.name: (model.slots, model.max_batch) for model in pool.status().models}
        assert figures == {"mean": (8, 8), "net": (24, 2)}
