"""TensorRT's timings are kept from one build to the next, against a small copy of its builder."""

from __future__ import annotations

from tests.workers.build_rig import Make


def test_timings_are_kept_for_the_next_build(trt, make_plan: Make, tmp_path):
    folder = tmp_path / "cache" / "timing"
    file = folder / f"tensorrt-{trt.__version__}-NVIDIA-H100-80GB-HBM3-9.0.timing"
    for builds in ("+", "++"):
        make_plan(request={"timing_cache": str(folder)})
        assert [*folder.iterdir()] == [file]
        assert file.read_text() == trt.__version__ + builds


def test_timings_that_do_not_fit_are_left_out(trt, make_plan: Make, tmp_path):
    make_plan(request={"timing_cache": str(tmp_path / "timing")})
    (file,) = (tmp_path / "timing").iterdir()
    file.write_text("of another version")
    make_plan(request={"timing_cache": str(tmp_path / "timing")})
    assert file.read_text() == trt.__version__ + "+"


def test_without_a_folder_for_timings_a_build_goes_on(trt, make_plan: Make, tmp_path):
    (tmp_path / "file").touch()
    assert make_plan(request={"timing_cache": str(tmp_path / "file" / "timing")}).record.plan_bytes
