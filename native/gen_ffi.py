"""Turns rondel.h into the module `_rondel` (cffi, out-of-line ABI mode); run by CMake."""

import re
import sys
from pathlib import Path

from cffi import FFI


def main(header: str, output: str) -> None:
    """Write the binding for `header` to `output`."""
    text = Path(header).read_text(encoding="utf-8")
    ffi = FFI()
    ffi.cdef(re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE))
    ffi.set_source("rondel.native._rondel", None)
    ffi.emit_python_code(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
