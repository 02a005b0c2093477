"""A model that runs: `Model` (weights in place), `Session` (one inference timeline), `Sampler`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fsencode
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rondel.native.file import File
from rondel.native.library import as_int32, check, check_handle, ffi, lib
from rondel.native.machine import cpu_count

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray  # slow to import, and only annotations need it


class Model:
    """A GGUF model bound to its map: nothing is copied, and opening takes milliseconds.

    Raises `NativeError` where a tensor is missing, has a wrong shape or a type the runtime cannot compute with.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._handle: Any = ffi.gc(check_handle(lib.rondel_model_open(fsencode(path))), lib.rondel_model_close)
        self.file = File.borrow(lib.rondel_model_file(self._handle), self)

    @property
    def handle(self) -> Any:
        """The C handle; raises `ValueError` after `close`."""
        if self._handle is None:
            raise ValueError("the model is closed")
        return self._handle

    @property
    def warnings(self) -> list[str]:
        """What of the file is ignored, one sentence each."""
        texts: list[str] = []
        while (text := lib.rondel_model_warning(self.handle, len(texts))) != ffi.NULL:
            texts.append(ffi.string(text).decode("utf-8", "replace"))
        return texts

    @property
    def vocabulary(self) -> int:
        """Tokens the model knows: the length of a row of logits."""
        return int(lib.rondel_model_vocabulary(self.handle))

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return int(lib.rondel_model_width(self.handle))

    @property
    def context(self) -> int:
        """The context length it was trained with, in tokens."""
        return int(lib.rondel_model_context(self.handle))

    @property
    def layers(self) -> int:
        """Layers in the file."""
        return int(lib.rondel_model_layers(self.handle))

    def steps(self, replication: bool = True) -> int:
        """Layer executions for one token."""
        return int(lib.rondel_model_steps(self.handle, replication))

    def close(self) -> None:
        """Unmaps the file. Its sessions must be closed before."""
        if self._handle is not None:
            self.file.close()
            ffi.release(self._handle)
            self._handle = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Session:
    """One inference timeline on a model: a KV cache of `context` tokens, and threads.

    `batch` is how many tokens of a prompt run at a time; `kv` is "auto" (F32 for an F32 model, else F16), "F16" or
    "F32"; without `replication` the base path runs. `threads` defaults to the cores this process may use. The results
    depend neither on `batch` nor on `threads`, bit for bit. One Python thread at a time may use a session; any number
    of sessions may share a model.
    """

    def __init__(
        self,
        model: Model,
        *,
        context: int | None = None,
        batch: int = 512,
        threads: int | None = None,
        kv: Literal["auto", "F16", "F32"] = "auto",
        replication: bool = True,
    ) -> None:
        self.model = model  # must outlive the session
        self.context = min(model.context, 4096) if context is None else context
        self.threads = cpu_count() if threads is None else threads
        handle = lib.rondel_session_new(
            model.handle, as_int32(self.context), min(batch, 65536), as_int32(self.threads), kv.encode(), replication
        )
        self._handle: Any = ffi.gc(check_handle(handle), lib.rondel_session_free)

    @property
    def handle(self) -> Any:
        """The C handle; raises `ValueError` after `close`."""
        if self._handle is None:
            raise ValueError("the session is closed")
        return self._handle

    def eval(
        self, tokens: Sequence[int] | NDArray[np.integer[Any]], position: int | None = None, all: bool = False
    ) -> NDArray[np.float32]:
        """Evaluate `tokens` from `position` on (default: after what is held; later tokens are forgotten).

        Returns logits: (n, vocabulary) with `all`, else (1, vocabulary) of the last token. Raises `NativeError` for a
        token outside the vocabulary and where the context is full.
        """
        ids = np.ascontiguousarray(tokens, np.int32)
        logits = np.empty((len(ids) if all else 1, self.model.vocabulary), np.float32)
        self._run(ids, position, all, ffi.from_buffer("float[]", logits, require_writable=True))
        return logits

    def prefill(self, tokens: Sequence[int] | NDArray[np.integer[Any]], position: int | None = None) -> None:
        """Like `eval`, for tokens whose logits nobody wants: the head is not computed."""
        self._run(np.ascontiguousarray(tokens, np.int32), position, False, ffi.NULL)

    def _run(self, ids: NDArray[np.int32], position: int | None, all: bool, logits: Any) -> None:
        _ = self.model.handle  # raises ValueError where the model was closed: its weights are gone
        start = self.length if position is None else position
        data = ffi.from_buffer("int32_t[]", ids)
        check(lib.rondel_session_eval(self.handle, data, len(ids), start, all, logits))

    @property
    def length(self) -> int:
        """Tokens held."""
        return int(lib.rondel_session_length(self.handle))

    @property
    def bytes_read(self) -> int:
        """Bytes of weights and of cached keys and values that the last eval read."""
        return int(lib.rondel_session_bytes_read(self.handle))

    @property
    def memory(self) -> int:
        """Bytes of KV cache and scratch, beside the mapped file."""
        return int(lib.rondel_session_memory(self.handle))

    def close(self) -> None:
        """Stops the threads and frees the cache."""
        if self._handle is not None:
            ffi.release(self._handle)
            self._handle = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Sampler:
    """Chooses tokens: penalty, then temperature, top-k (0: all), top-p and min-p; greedy where temperature <= 0.

    The same logits, settings and seed always choose the same token. Raises `NativeError` for a setting out of range.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        repeat_last: int = 64,
        seed: int = 0,
    ) -> None:
        handle = lib.rondel_sampler_new(
            temperature,
            as_int32(top_k),
            top_p,
            min_p,
            repeat_penalty,
            as_int32(repeat_last),
            seed & 0xFFFF_FFFF_FFFF_FFFF,
        )
        self._handle = ffi.gc(check_handle(handle), lib.rondel_sampler_free)

    def accept(self, token: int) -> None:
        """Remember a token of the prompt or of the answer, for the repetition penalty."""
        lib.rondel_sampler_accept(self._handle, token)

    def next(self, logits: NDArray[np.float32]) -> int:
        """The next token for logits (vocabulary,) or (1, vocabulary); `accept` is up to the caller."""
        row = np.ascontiguousarray(logits, np.float32).reshape(-1)
        return check(lib.rondel_sampler_next(self._handle, ffi.from_buffer("float[]", row), len(row)))
