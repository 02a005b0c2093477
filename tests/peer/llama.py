"""Unmodified llama.cpp through its C interface: load a GGUF, tokenize, evaluate, generate greedily.

The library is the one inside `xllamacpp` (prebuilt wheels) or `llama-cpp-python`. Both export the C functions; only the
first four fields of the context parameters are touched (they have kept their place for years), everything else stays
as the library's own defaults return it.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

PARAMETER_BYTES = 1024  # more than any version's parameter struct: the callee reads only its own part
TOKEN = ctypes.c_int32


class _Parameters(ctypes.Structure):
    _fields_ = (("fields", ctypes.c_uint32 * (PARAMETER_BYTES // 4)),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(TOKEN)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
quiet = _LOG(lambda level, text, data: None)

_SIGNATURES = {
    "llama_model_default_params": (_Parameters, []),
    "llama_context_default_params": (_Parameters, []),
    "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, _Parameters]),
    "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, _Parameters]),
    "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_vocab_get_add_bos": (ctypes.c_bool, [ctypes.c_void_p]),
    "llama_vocab_bos": (TOKEN, [ctypes.c_void_p]),
    "llama_tokenize": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(TOKEN), ctypes.c_int32, *[ctypes.c_bool] * 2],
    ),
    "llama_batch_init": (_Batch, [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, _Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p, ctypes.c_int32]),
    "llama_get_memory": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_memory_clear": (None, [ctypes.c_void_p, ctypes.c_bool]),
    "llama_set_n_threads": (None, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
    "llama_adapter_lora_init": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "llama_free": (None, [ctypes.c_void_p]),
    "llama_model_free": (None, [ctypes.c_void_p]),
    "llama_log_set": (None, [_LOG, ctypes.c_void_p]),
}


def find_library() -> Path | None:
    """The shared library with llama.cpp in it, or None where no peer is installed."""
    for package, pattern in (("xllamacpp", "*.so"), ("llama_cpp", "lib/libllama.*")):
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            found = sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
            if found:
                return found[0]
    return None


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(quiet, None)
    library.llama_backend_init()
    return library


class Llama:
    """A model in unmodified llama.cpp, evaluated in windows of at most `context` tokens."""

    _library: ctypes.CDLL | None = None

    def __init__(self, path: Path, context: int = 512, threads: int = 2) -> None:
        if Llama._library is None:
            library = find_library()
            assert library is not None, "ask find_library() first"
            Llama._library = _open(library)
        self.lib = Llama._library
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp refuses {path.name}")
        parameters = self.lib.llama_context_default_params()
        parameters.fields[0:3] = [context, context, context]  # n_ctx, n_batch, n_ubatch
        self.context = self.lib.llama_init_from_model(self.model, parameters)
        assert self.context, f"llama.cpp makes no context of {context} tokens"
        self.lib.llama_set_n_threads(self.context, threads, threads)
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.vocabulary = self.lib.llama_vocab_n_tokens(self.vocab)

    def close(self) -> None:
        """Free the context and the model."""
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text."""
        raw = text.encode()
        buffer = (TOKEN * (len(raw) + 8))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), buffer, len(buffer), add_special, parse_special)
        assert count >= 0, "the buffer holds one token a byte and the special ones"
        return list(buffer[:count])

    def forget(self) -> None:
        """Empty the KV cache."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def correct(self, adapter: Path | None) -> None:
        """Add a LoRA file to the model, or take what was added away. Refuses with ValueError what llama.cpp refuses."""
        loaded = self.lib.llama_adapter_lora_init(self.model, str(adapter).encode()) if adapter else None
        if adapter and not loaded:
            raise ValueError(f"llama.cpp refuses {adapter.name}")
        adapters = (ctypes.c_void_p * 1)(loaded)
        scales = (ctypes.c_float * 1)(1.0)
        self._set_adapters(adapters, ctypes.c_size_t(1 if loaded else 0), scales)
        self.forget()

    def _set_adapters(self, adapters: object, count: ctypes.c_size_t, scales: object) -> None:
        function = getattr(self.lib, "llama_set_adapters_lora", None)  # of this year's versions
        assert function is not None, "this llama.cpp is older than llama_set_adapters_lora"
        code = function(ctypes.c_void_p(self.context), adapters, count, scales)
        assert code == 0, f"llama_set_adapters_lora answers {code}"

    def eval(self, tokens: Sequence[int], position: int = 0) -> np.ndarray:
        """Logits (n, vocabulary) after each token."""
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position + i, 1, 1
            batch.seq_id[i][0] = 0
        code = self.lib.llama_decode(self.context, batch)
        assert code == 0, f"llama_decode answers {code}"
        rows = [
            np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (self.vocabulary,)).copy()
            for i in range(len(tokens))
        ]
        self.lib.llama_batch_free(batch)
        return np.stack(rows)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` most likely tokens after the prompt, one at a time."""
        self.forget()
        answer = [int(self.eval(prompt)[-1].argmax())]
        while len(answer) < count:
            answer.append(int(self.eval(answer[-1:], len(prompt) + len(answer) - 1)[-1].argmax()))
        return answer

    @property
    def begin(self) -> int | None:
        """The token that the vocabulary puts before every text, if it does."""
        return int(self.lib.llama_vocab_bos(self.vocab)) if self.lib.llama_vocab_get_add_bos(self.vocab) else None

    def nll(self, tokens: Sequence[int], context: int) -> tuple[float, int]:
        """llama.cpp's perplexity protocol: mean negative log likelihood (nats) of the second half of each window."""
        first, total, count = context // 2, 0.0, 0
        for start in range(0, len(tokens) - context + 1, context):
            window = list(tokens[start : start + context])
            if self.begin is not None:
                window[0] = self.begin
            self.forget()
            logits = self.eval(window)[first:-1].astype(np.float64)
            target = np.array(tokens[start + first + 1 : start + context])
            top = logits.max(axis=1)
            norm = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
            total += float((norm - logits[np.arange(len(target)), target]).sum())
            count += len(target)
        return total / count, count
