"""Which GPU a plan is built for."""

from __future__ import annotations

import pytest

from tests.workers.build_rig import Make, install
from trtpool.ipc.errors import ConfigError, DeviceUnavailable, MissingExtra
from trtpool.ipc.settings import GpuInfo
from trtpool.workers import build_target


@pytest.mark.parametrize("error", [DeviceUnavailable("no driver"), MissingExtra("no cuda-python")])
def test_without_a_gpu_tensorrt_is_not_even_started(error, make_plan: Make, monkeypatch):
    trt = install("8.6.0", monkeypatch)
    monkeypatch.delattr(trt, "Builder")

    def look() -> GpuInfo:
        raise error

    monkeypatch.setattr(build_target, "look", look)
    with pytest.raises(type(error), match=str(error)):
        make_plan()


def test_only_the_flavour_for_rtx_builds_for_a_gpu_that_is_not_here(trt, make_plan: Make):
    with pytest.raises(ConfigError, match="leave it out, or add --flavour rtx"):
        make_plan(compute_capability="8.9")
