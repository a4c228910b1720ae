"""Every test that docs/security.md relies on is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "security.md").read_text())))


def test_the_claims_are_found():
    assert len(CLAIMS) > 30


@pytest.mark.parametrize(("file", "name"), CLAIMS, ids=[name for _, name in CLAIMS])
def test_a_claim_has_its_test(file, name):
    assert re.search(rf"^(def {name}\(|{name} = )", (ROOT / file).read_text(), re.MULTILINE)


def test_nothing_of_ours_reads_a_format_that_can_run_code():
    files = [file for part in ("ipc", "broker", "workers") for file in (ROOT / part).glob("*.py")]
    assert len(files) > 50
    loads = re.compile(
        r"\b(import|from) (pickle|marshal|shelve|dill|cloudpickle|joblib)\b|allow_pickle|\b(eval|exec)\("
    )
    assert [file.name for file in files if loads.search(file.read_text())] == []
