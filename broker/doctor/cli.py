"""`trtpool doctor`."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import click
import msgspec

from trtpool import __version__
from trtpool.ipc import rundir

from . import container, gpus, kernel, leftovers, limits, memory, packages
from . import places as places_check
from .asking import ask
from .finding import Finding, Host

PROBLEM_CODE: Final = 1
"""The exit code if there is a problem; warnings are none."""

_COLOURS: Final = {"ok": "green", "warning": "yellow", "problem": "red"}
_CHECK_WIDTH: Final = 14
_STATUS_WIDTH: Final = 8
MAX_WIDTH: Final = 120


@click.command()
@click.option("--name", default="default", show_default=True, help="The pool's name.")
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="Its run directory [default: $TRTPOOL_RUN_DIR, or a directory for the name].",
)
@click.option("--fix", is_flag=True, help="Remove what pools that were killed left behind; nothing else is changed.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(*, name: str, run_dir: Path | None, fix: bool, as_json: bool) -> None:
    """Check this machine, and say what to do about what is wrong.

    Looks at the kernel, memory, limits, containers, packages, GPUs, and at what pools that were killed left behind.
    The exit code is 1 if there is a problem; warnings are none.
    """
    findings = list(examine(Host(), rundir.run_dir_of(name, run_dir), fix=fix))
    if as_json:
        report = {"version": __version__, "ok": not problems(findings), "findings": findings}
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        show(findings)
    sys.exit(PROBLEM_CODE if problems(findings) else 0)


def examine(host: Host, run_dir: Path, *, fix: bool = False) -> Iterator[Finding]:
    """All findings, check by check.

    Args:
        host: the machine.
        run_dir: where a pool would run.
        fix: remove what is left over.
    """
    answer = ask()
    checks: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
        ("packages", lambda: packages.look(answer)),
        ("gpus", lambda: gpus.look(host, answer)),
        ("kernel", lambda: kernel.look(host)),
        ("memory", lambda: memory.look(host)),
        ("limits", lambda: limits.look(host)),
        ("container", lambda: container.look(host)),
        ("run-directory", lambda: places_check.look(run_dir)),
        ("leftovers", lambda: leftovers.look(host, leftovers.places(run_dir), fix=fix)),
    )
    for check, look in checks:
        try:
            yield from look()
        except Exception as error:  # noqa: BLE001  # on a machine that nobody foresaw the other checks still help
            yield Finding(
                check, "warning", f"this could not be looked at: {error!r}", "report it, with this line and your system"
            )


def problems(findings: Iterable[Finding]) -> int:
    """How many are problems."""
    return sum(finding.status == "problem" for finding in findings)


def show(findings: list[Finding]) -> None:
    """Print one line for each, as wide as the terminal, with what to do below it."""
    width = max(60, min(MAX_WIDTH, shutil.get_terminal_size().columns))
    indent = " " * (_STATUS_WIDTH + _CHECK_WIDTH)
    previous = ""
    for finding in findings:
        status = click.style(f"{finding.status:<{_STATUS_WIDTH}}", fg=_COLOURS[finding.status])
        check = "" if finding.check == previous else finding.check
        previous = finding.check
        first, *rest = textwrap.wrap(
            finding.text, width - len(indent), break_long_words=False, break_on_hyphens=False
        ) or [""]  # fmt: skip
        click.echo(f"{status}{check:<{_CHECK_WIDTH}}{first}")
        for line in rest:
            click.echo(indent + line)
        for line in textwrap.wrap(
            f"-> {finding.remedy}" if finding.remedy else "", width - len(indent), subsequent_indent="   ",
            break_long_words=False, break_on_hyphens=False,
        ):  # fmt: skip
            click.echo(indent + click.style(line, bold=True))
    wrong, warnings = problems(findings), sum(finding.status == "warning" for finding in findings)
    click.echo(f"\n{_count(wrong, 'problem')}, {_count(warnings, 'warning')}")


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'s' if number != 1 else ''}"
