"""Packages of optional extras, imported when they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import MissingExtra


def load_extra(module: str, needs: str, extra: str) -> ModuleType:
    """Import a package.

    Args:
        module: what to import.
        needs: who needs what, such as "trtpool.ray needs Ray", for the error's text.
        extra: the extra of trtpool that installs it.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{needs}: pip install 'trtpool[{extra}]' ({error})") from error
