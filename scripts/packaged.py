"""Files of Python packages that are installed for what is in them: models, and data to run them on.

No package is imported: what it says in code may need others, which ``scripts/setup`` leaves out.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from trtpool.ipc.errors import MissingExtra


def packaged_file(package: str, inner: str, install: str = "scripts/setup cpu models") -> Path:
    """Return the file `inner` of an installed import package, without importing that.

    Args:
        package: such as "magika".
        inner: path inside of it.
        install: the command that installs it.

    Raises:
        MissingExtra: the package is not installed, or has no such file.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise MissingExtra(f"the package {package} is not installed; run: {install}")
    path = Path(found.origin).parent / inner
    if not path.is_file():
        raise MissingExtra(f"the package {package} here has no {inner}; run: {install}")
    return path
