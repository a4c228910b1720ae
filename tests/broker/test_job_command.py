"""The command line of `trtpool run`: what its words make of the job and of its pool."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import trtpool
from trtpool.broker import cli
from trtpool.broker.jobs import command, show
from trtpool.broker.jobs.work import Outcome
from trtpool.ipc.errors import ConfigError

OF_POOLS = {
    *("gpus", "workers", "workers_per_gpu", "threads", "lanes", "flavour", "graphs", "allow_host_code", "huge_pages"),
    *("shapes", "no_batch", "partial", "batch_timeout_s", "start_timeout_s"),
    *("slots", "max_batch", "max_delay_us"),
}


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Gives the arguments of the `Job` that a command line makes."""
    monkeypatch.chdir(tmp_path)
    Path("det.onnx").touch()

    def make(*words: str) -> tuple[Any, ...]:
        made: list[tuple[Any, ...]] = []

        class NoJob:
            def __init__(self, *given: Any) -> None:
                made.append(given)

            def stop(self) -> None:
                raise AssertionError

            def run(self) -> None:
                return None

        monkeypatch.setattr(command, "Job", NoJob)
        line = ["det.onnx", "--input", "a.png", "--output", "out.jsonl", *words]
        done = CliRunner().invoke(command.run, line, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return made[0]

    return make


def test_options_of_a_pool_are_those_of_start() -> None:
    start = cli.cli.commands["start"].params
    theirs, ours = ({str(one.name): one.to_info_dict() for one in params} for params in (start, command.run.params))
    assert set(ours) >= OF_POOLS
    assert {name: ours[name] for name in OF_POOLS} == {name: theirs[name] for name in OF_POOLS}


def test_all_that_is_given_to_the_pool_is_known_there(job: Callable[..., Any]) -> None:
    _, how, *_ = job("--no-graphs", "--allow-host-code", "--partial-batches", "refuse", "--batch-timeout-s", "5")
    assert set(how.pool) <= set(inspect.signature(trtpool.Pool.__init__).parameters)
    assert how.pool["graphs"] is False
    assert how.pool["host_code"] is True
    assert how.pool["partial_batches"] == "refuse"
    assert how.pool["batch_timeout_s"] == 5
    assert how.pool["gpus"] is None


@pytest.mark.parametrize("word", ["8", "det=8"])
def test_numbers_of_the_one_model_may_name_it(job: Callable[..., Any], word: str) -> None:
    _, how, *_ = job("--max-batch", word, "--slots", "32")
    assert (how.pool["max_batch"], how.pool["slots"]) == (8, 32)
    assert "max_delay_us" not in how.pool


def test_numbers_of_another_model_are_refused(job: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"--max-delay-us cls=...: the job has one model, det; leave the name out"):
        job("--max-delay-us", "cls=5")


def test_what_changes_answers_must_be_the_same_when_a_job_is_resumed(job: Callable[..., Any]) -> None:
    plain, *_ = job()
    for words in (("--shape", "x=3x4x4"), ("--no-batch", "det"), ("--fp16",)):
        assert job(*words)[0] != plain, words
    for words in (("--workers", "2"), ("--lanes", "1"), ("--max-batch", "2"), ("--producers", "3"), ("--resume",)):
        assert job(*words)[0] == plain, words


@pytest.mark.parametrize(("producers", "said"), [(1, "5.0 rows/s with 1 producer\n"), (2, "with 2 producers\n")])
def test_the_table_counts_producers(producers: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    show.show_outcome(Outcome(10, 0, (), 2.0, {"decoding": 0.5}, 0, ()), producers)
    assert said in capsys.readouterr().out


def test_words_too_many_are_an_error_of_use() -> None:
    done = CliRunner().invoke(command.run, ["det.onnx", "b.png", "--input", "a.png", "--output", "o.npy"])
    assert done.exit_code == click.UsageError.exit_code
    assert "quote globs" in done.output
