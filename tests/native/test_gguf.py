"""The GGUF reader: what it reads, and that a hostile file is refused with a sentence and never crashes it."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from rondel.native import File, Model, NativeError
from tests.native.reference import Numbers, random_weights, write_gguf

TYPES = gguf.GGUFValueType
U8, U16, U32, I32, F32, STRING, ARRAY, U64 = 0, 2, 4, 5, 6, 8, 9, 10


def text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def u32(name: str, value: int) -> bytes:
    return key(name, U32, struct.pack("<I", value))


def strings(name: str, values: list[str]) -> bytes:
    return key(name, ARRAY, struct.pack("<IQ", STRING, len(values)) + b"".join(map(text, values)))


def u64s(name: str, values: list[int]) -> bytes:
    return key(name, ARRAY, struct.pack(f"<IQ{len(values)}Q", U64, len(values), *values))


def info(name: str | bytes, shape: list[int], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def build(
    keys: list[bytes],
    infos: list[bytes],
    data: bytes = b"",
    alignment: int = 32,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensors, pairs = counts or (len(infos), len(keys))
    header = b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + b"".join(keys) + b"".join(infos)
    return header + bytes(-len(header) % alignment) + data


GOOD_KEYS = [u32("a.number", 7), key("a.text", STRING, text("hé")), strings("a.list", ["x", "", "yz"])]
GOOD = build(GOOD_KEYS, [info("one", [4, 2], 0, 0), info("two", [32], 8, 32)], bytes(range(32)) + b"\0\x3c" + bytes(32))


def save(tmp_path: Path, raw: bytes, name: str = "f.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(raw)
    return path


def test_keys_and_tensors(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, tuple[Any, gguf.GGUFValueType]] = {
        "k.u8": (200, TYPES.UINT8),
        "k.i8": (-100, TYPES.INT8),
        "k.u16": (60000, TYPES.UINT16),
        "k.i16": (-30000, TYPES.INT16),
        "k.i32": (-2_000_000_000, TYPES.INT32),
        "k.u64": (2**63 + 5, TYPES.UINT64),
        "k.i64": (-(2**62), TYPES.INT64),
        "k.f32": (0.5, TYPES.FLOAT32),
        "k.f64": (1e300, TYPES.FLOAT64),
        "k.bool": (True, TYPES.BOOL),
        "k.string": ("žluťoučký", TYPES.STRING),
    }
    for name, (value, kind) in values.items():
        writer.add_key_value(name, value, kind)
    writer.add_array("k.strings", ["a", "", "ř"])
    writer.add_array("k.floats", [0.5, -1.5])
    tensor = np.arange(6, dtype=np.float32).reshape(2, 3)
    writer.add_tensor("first", tensor)
    writer.add_tensor("second", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with File(path) as file:
        assert (file.version, file.alignment, file.shards) == (3, 32, [str(path)])
        for name, (value, _) in values.items():
            assert file.keys[name] == value
            assert type(file.keys[name]) is type(value)
        assert file.keys["k.strings"] == ["a", "", "ř"]
        assert file.keys["k.floats"].tolist() == [0.5, -1.5]
        assert (file.keys.type("k.i8"), file.keys.type("k.strings")) == ("i8", "array of string")
        assert len(file.keys) == len(values) + 3
        assert "absent" not in file.keys
        first, second = file.tensors
        assert (first.name, first.format, first.shape, first.bytes, first.shard) == ("first", "F32", (2, 3), 24, 0)
        assert (second.shape, second.offset - first.offset) == ((5,), 32)
        assert file.data(first).tobytes() == tensor.tobytes()
        assert first.offset == len(path.read_bytes()) - 64


def test_bytes_that_are_no_utf8_survive(tmp_path: Path) -> None:
    with File(save(tmp_path, build([key("k", STRING, text(b"\xff\xfe"))], []))) as file:
        assert file.keys["k"].encode("utf-8", "surrogateescape") == b"\xff\xfe"


def test_a_long_string_array_decodes_quickly(tmp_path: Path) -> None:
    words = [f"token-{i}" for i in range(150_000)]
    with File(save(tmp_path, build([strings("tokenizer.ggml.tokens", words)], []))) as file:
        assert file.keys["tokenizer.ggml.tokens"] == words


def test_version_2_and_files_without_final_padding_are_read(tmp_path: Path) -> None:
    with File(save(tmp_path, build(GOOD_KEYS, [info("one", [3], 0, 0)], bytes(12), version=2))) as file:
        assert file.version == 2
        assert file.tensors[0].bytes == 12


def test_a_closed_file_says_so(tmp_path: Path) -> None:
    file = File(save(tmp_path, GOOD))
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        _ = file.keys["a.number"]


HUGE = 2**63 + 7
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file"),
    "text": (b"hello, I am a text file, not a model", "not a GGUF file"),
    "version 1": (build([], [], version=1), "GGUF version 1"),
    "version 4": (build([], [], version=4), "GGUF version 4"),
    "big endian": (build([], [], version=0x03000000), "big-endian"),
    "many keys": (build([], [], counts=(0, HUGE)), "announces"),
    "many tensors": (build([], [], counts=(HUGE, 0)), "announces"),
    "empty key": (build([u32("", 1)], []), "empty name"),
    "key twice": (build([u32("k", 1), u32("l", 1), u32("k", 2)], []), "the key k is there twice"),
    "key type": (build([key("k", 13, b"")], []), "value type 13"),
    "nested array": (build([key("k", ARRAY, struct.pack("<IQ", ARRAY, 0))], []), "element type 9"),
    "string length": (build([key("k", STRING, struct.pack("<Q", HUGE))], []), "runs past the end"),
    "key length": (build([struct.pack("<Q", 2**64 - 8) + b"name"], []), "runs past the end"),
    "array length": (build([key("k", ARRAY, struct.pack("<IQ", U64, 2**61))], []), "runs past the end"),
    "array product": (build([key("k", ARRAY, struct.pack("<IQ", U64, 2**30))], []), "runs past the end"),
    "alignment 0": (build([u32("general.alignment", 0)], []), "power of two"),
    "alignment 48": (build([u32("general.alignment", 48)], []), "power of two"),
    "alignment type": (build([key("general.alignment", U64, struct.pack("<Q", 32))], []), "power of two"),
    "tensor name": (build([], [info("n" * 64, [1], 0, 0)], bytes(32)), "longer than 63"),
    "tensor name zero": (build([], [info(b"a\0b", [1], 0, 0)], bytes(32)), "zero byte"),
    "tensor twice": (build([], [info("n", [1], 0, 0), info("n", [1], 0, 32)], bytes(64)), "tensor n is there twice"),
    "dims": (build([], [info("n", [1] * 5, 0, 0)], bytes(32)), "5 dimensions"),
    "negative": (build([], [info("n", [2**64 - 1], 0, 0)], bytes(32)), "too large"),
    "product": (build([], [info("n", [2**32, 2**32], 0, 0)], bytes(32)), "too large"),
    "byte size": (build([], [info("n", [2**62], 0, 0)], bytes(32)), "overflows"),
    "sum of sizes": (
        build([], [info("a", [2**62 - 1], 0, 0), info("b", [2**62 - 1], 0, 2**64 - 32)]),
        "overflows|expected|end",
    ),
    "type 43": (build([], [info("n", [1], 43, 0)], bytes(32)), "unknown type 43"),
    "removed type": (build([], [info("n", [32], 4, 0)], bytes(32)), "unknown type 4"),
    "block": (build([], [info("n", [33], 8, 0)], bytes(64)), "multiple of 32"),
    "gap": (build([], [info("a", [1], 0, 0), info("b", [1], 0, 64)], bytes(96)), "offset 64, expected 32"),
    "shared data": (build([], [info("a", [1], 0, 0), info("b", [1], 0, 0)], bytes(96)), "offset 0, expected 32"),
    "truncated data": (build([], [info("a", [9], 0, 0)], bytes(32)), "runs past the end"),
    "no data": (build([], [info("a", [2**40], 0, 0)]), "runs past the end"),
    "feature": (
        build(
            [
                strings("rondel.requires", ["tile-1", "warp-9"]),
                key("rondel.version", ARRAY, struct.pack("<IQ3I", U32, 3, 1, 4, 2)),
            ],
            [],
        ),
        "feature 'warp-9'.*rondel 1.4.2 wrote",
    ),
    "major": (build([key("rondel.version", ARRAY, struct.pack("<IQ3I", U32, 3, 2, 0, 0))], []), "newer rondel"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    raw, sentence = HOSTILE[name]
    path = save(tmp_path, raw)
    with pytest.raises(NativeError, match=sentence) as caught:
        File(path)
    assert str(caught.value).startswith(str(path))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(NativeError, match="cannot open the file: No such file"):
        File(tmp_path / "absent.gguf")
    with pytest.raises(NativeError, match="not a GGUF file"):
        File(tmp_path)


def test_a_tensor_without_elements_is_allowed(tmp_path: Path) -> None:
    with File(
        save(tmp_path, build([], [info("none", [0, 2**62, 2**62], 0, 0), info("one", [1], 0, 0)], bytes(32)))
    ) as file:
        assert [tensor.bytes for tensor in file.tensors] == [0, 4]
        assert [file.damage(tensor) for tensor in file.tensors] == [None, None]


@pytest.mark.parametrize("cut", [1, 0])
def test_every_truncation_is_refused(cut: int, tmp_path: Path) -> None:
    """A file cut anywhere; what is cut is the end, or (0) the bytes are there but zero."""
    end = len(GOOD)
    for length in range(end):
        path = save(tmp_path, GOOD[:length] + bytes((1 - cut) * (end - length)))
        if cut:
            with pytest.raises(NativeError):
                File(path)
        else:
            read_everything(path)


def read_everything(path: Path, opener: Callable[[Path], Any] = File) -> None:
    """Either a NativeError, or everything that the file describes can be touched."""
    try:
        opened = opener(path)
    except NativeError:
        return
    file = opened if isinstance(opened, File) else opened.file
    for name in file.keys:
        assert file.keys[name] is not None
    for tensor in file.tensors:
        assert len(file.data(tensor)) == tensor.bytes
        with contextlib.suppress(NativeError):  # a type that cannot be decoded
            file.damage(tensor)
    opened.close()


@pytest.mark.parametrize("value", [0x00, 0x01, 0x7F, 0x80, 0xFF])
def test_every_byte_of_the_header_may_be_wrong(value: int, tmp_path: Path) -> None:
    for at in range(len(GOOD) - 66):
        read_everything(save(tmp_path, GOOD[:at] + bytes([value]) + GOOD[at + 1 :]))


def test_every_byte_of_a_model_s_header_may_be_wrong(tmp_path: Path) -> None:
    numbers = Numbers(layers=1, width=8, hidden=8, heads=2, kv_heads=1, head_dim=4, vocabulary=8)
    good = write_gguf(tmp_path / "good.gguf", numbers, random_weights(numbers)).read_bytes()
    with File(tmp_path / "good.gguf") as file:
        header = file.tensors[0].offset
    for at in range(header):
        value = good[at] ^ (0xFF, 0x01, 0x80)[at % 3]
        read_everything(save(tmp_path, good[:at] + bytes([value]) + good[at + 1 :]), Model)


def extended(rows: int = 16, cols: int = 64, **changes: Any) -> bytes:
    """A file with one U4-64 tensor: 16 rows x 64 columns in 8 tiles of 64 bytes and 16 scales."""
    values: dict[str, Any] = {"names": ["w"], "formats": ["U4-64"], "shape": [cols, rows, 1, 1], "alignment": 64}
    values |= {"size": 8 * 64 + 32, "type": 24, "lead": 0} | changes
    size, lead = values["size"], values["lead"]
    keys = [
        u32("general.alignment", values["alignment"]),
        strings("rondel.requires", ["tile-1"]),
        strings("rondel.tensor.name", values["names"]),
        strings("rondel.tensor.format", values["formats"]),
        u64s("rondel.tensor.shape", values["shape"]),
    ]
    stored = [size] if values["type"] == 24 else [size // 4]
    infos = [
        info("first", [lead], 24, 0),
        info("w", stored, values["type"], -(-lead // values["alignment"]) * values["alignment"]),
    ]
    return build(keys, infos, bytes(size + 128), values["alignment"])


def test_extended_tensors_are_matrices_of_their_format(tmp_path: Path) -> None:
    with File(save(tmp_path, extended())) as file:
        tensor = file.tensors[1]
        assert (tensor.format, tensor.shape, tensor.bytes) == ("U4-64", (16, 64), 544)
        assert file.damage(tensor) is None


WRONG_EXTENDED = {
    "unknown name": ({"names": ["v"]}, "lists v, which the file does not hold"),
    "unknown format": ({"formats": ["U3-64"]}, "format 'U3-64'"),
    "ggml format": ({"formats": ["Q8_0"]}, "no extended format"),
    "rows": ({"rows": 17}, "holds 544 bytes"),
    "columns": ({"cols": 63}, "holds 544 bytes"),
    "huge": ({"shape": [2**62, 2**62, 1, 1]}, "holds 544 bytes"),
    "dimensions": ({"shape": [64, 8, 2, 1]}, "more than two dimensions"),
    "shape length": ({"shape": [64, 16]}, "n, n and 4n elements"),
    "format length": ({"formats": ["U4-64", "U4-64"]}, "n, n and 4n elements"),
    "stored type": ({"type": 0}, "stored as I8"),
    "alignment": ({"alignment": 32, "lead": 32}, "aligned to 64 bytes"),
}


@pytest.mark.parametrize("name", WRONG_EXTENDED)
def test_wrong_extended_tensors_are_refused(name: str, tmp_path: Path) -> None:
    changes, sentence = WRONG_EXTENDED[name]
    with pytest.raises(NativeError, match=sentence):
        File(save(tmp_path, extended(**changes)))


def test_damage_names_the_block(tmp_path: Path) -> None:
    good = bytes(2) + bytes(32)
    infinite = struct.pack("<H", 0x7C00) + b"\1" * 32
    raw = build([], [info("w", [64, 2], 8, 0)], good * 3 + infinite)
    with File(save(tmp_path, raw)) as file:
        sentence = file.damage(file.tensors[0])
    assert sentence is not None
    assert "tensor w: row 1, block 1 (Q8_0)" in sentence


def shard_keys(no: int, count: int, tensors: int) -> list[bytes]:
    return [
        key("split.no", U16, struct.pack("<H", no)),
        key("split.count", U16, struct.pack("<H", count)),
        key("split.tensors.count", I32, struct.pack("<i", tensors)),
    ]


def write_split(tmp_path: Path, total: int = 3) -> list[Path]:
    contents = [
        build([u32("a.number", 7), *shard_keys(0, 3, total)], []),
        build(shard_keys(1, 3, total), [info("one", [8], 0, 0)], bytes(range(32))),
        build(shard_keys(2, 3, total), [info("two", [2], 0, 0), info("three", [2], 0, 32)], bytes(64)),
    ]
    return [save(tmp_path, raw, f"m-{i + 1:05d}-of-00003.gguf") for i, raw in enumerate(contents)]


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_splits_open_from_any_shard(opened: int, tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    with File(paths[opened]) as file:
        assert file.shards == [str(path) for path in paths]
        assert [(tensor.name, tensor.shard) for tensor in file.tensors] == [("one", 1), ("two", 2), ("three", 2)]
        assert file.keys["a.number"] == 7
        assert file.data(file.tensors[0]).tobytes() == bytes(range(32))


def test_wrong_splits_are_refused(tmp_path: Path) -> None:
    paths = write_split(tmp_path, total=4)
    with pytest.raises(NativeError, match=r"hold 3 tensors, split\.tensors\.count says 4"):
        File(paths[0])
    paths = write_split(tmp_path)
    swapped = paths[1].read_bytes()
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(NativeError, match="says that it is shard 3 of 3, expected 2 of 3"):
        File(paths[0])
    paths[1].unlink()
    with pytest.raises(NativeError, match=r"00002-of-00003\.gguf: cannot open"):
        File(paths[0])
    with pytest.raises(NativeError, match="must be called"):
        File(save(tmp_path, swapped, "renamed.gguf"))
    twice = build(shard_keys(1, 3, 3), [info("two", [8], 0, 0)], bytes(32))
    save(tmp_path, twice, paths[1].name)
    with pytest.raises(NativeError, match="tensor two is there twice"):
        File(paths[0])
