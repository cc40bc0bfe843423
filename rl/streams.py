"""Output that nobody reads any more: a training does not fail because its terminal, or the tee behind its pipe, is gone."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Unheard:
    """A stream that turns to /dev/null once its reader has left; anything else goes wrong as before."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._left():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._left():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _left(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            with open(
                os.devnull, "w"
            ) as nothing:  # what is buffered is then written there, also at the interpreter's end
                os.dup2(nothing.fileno(), self._stream.fileno())


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """While it is open, output goes nowhere once nobody reads it."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Unheard, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
