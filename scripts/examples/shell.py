"""What the examples have in common as programs: what goes wrong is one line that says what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn

MISSING: Final = 9
"""The exit code for a package that is not installed; `trtpool --help` has all."""


class needs:  # noqa: N801  # read as a word: `with needs("etl"):`
    """Imports inside of this, where they fail, end the program with the command that installs what is missing.

    Args:
        extras: those of pyproject.toml that have the packages.
    """

    def __init__(self, *extras: str) -> None:
        self._extras = extras

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ModuleNotFoundError):
            package = str(error.name).partition(".")[0]
            print(f"{package} is not installed; run: scripts/setup {' '.join(self._extras)}", file=sys.stderr)
            raise SystemExit(MISSING) from None


def run(file: str, main: Callable[[], int]) -> NoReturn:
    """End the program with the exit code of `main`; its errors become one line."""
    from trtpool.ipc.errors import TrtpoolError

    try:
        code = main()
    except (OSError, TrtpoolError) as error:
        print(f"{Path(file).stem}: {error}", file=sys.stderr)
        code = getattr(error, "exit_code", 1)
    sys.exit(code)
