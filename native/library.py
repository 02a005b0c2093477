"""Loads the shared library, checks its version, and turns its error codes into `NativeError`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rondel.native import _rondel

ffi = _rondel.ffi

ABI_VERSION = 4


class NativeError(Exception):
    """Something the runtime refuses: a damaged file, an unsupported model, a wrong shape. Shown to the user as is."""


def _load() -> Any:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    # CMake installs the generated module and the library side by side, also for an editable install.
    library = ffi.dlopen(str(Path(_rondel.__file__).with_name(f"librondel.{suffix}")))
    if library.rondel_abi_version() != ABI_VERSION:
        raise NativeError(
            f"the native library has interface version {library.rondel_abi_version()}, "
            f"this binding needs {ABI_VERSION}: install rondel again"
        )
    return library


lib = _load()


def last_error() -> str:
    """The sentence the library left behind for the last call that failed on this thread."""
    return ffi.string(lib.rondel_last_error()).decode("utf-8", "replace")


def as_int32(number: int) -> int:
    """`number` for a 32-bit parameter: beyond its range the nearest, which the library refuses in its own words."""
    return max(-(2**31), min(number, 2**31 - 1))


def check(code: int) -> int:
    """Return `code`, or raise `NativeError` where it is negative."""
    if code < 0:
        raise NativeError(last_error())
    return code


def check_handle(handle: Any) -> Any:
    """Return `handle`, or raise `NativeError` where it is NULL."""
    if handle == ffi.NULL:
        raise NativeError(last_error())
    return handle
