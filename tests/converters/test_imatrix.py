"""llama.cpp's importance matrices: what is written is read back, and by the gguf package; damaged files are refused."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rondel.converters.errors import RondelError
from rondel.converters.imatrix import read_imatrix, write_imatrix

SUMS = {
    "blk.0.ffn_down.weight": (np.array([3.0, 0.0, 1.5, 6.0]), 3.0),
    "blk.0.attn_q.weight": (np.array([8.0, 4.0]), 4.0),
}


def write(path: Path) -> Path:
    write_imatrix(path, SUMS, datasets=["/somewhere/text.txt"], chunk_size=512, chunk_count=7)
    return path


def test_values_are_means_and_come_back(tmp_path: Path) -> None:
    found = read_imatrix(write(tmp_path / "imatrix.gguf"))
    assert np.array_equal(found.values["blk.0.ffn_down.weight"], np.array([1.0, 0.0, 0.5, 2.0], np.float32))
    assert np.array_equal(found.values["blk.0.attn_q.weight"], np.array([2.0, 1.0], np.float32))
    assert found.counts == {"blk.0.attn_q.weight": 4.0, "blk.0.ffn_down.weight": 3.0}
    assert (found.chunk_count, found.chunk_size, found.datasets) == (7, 512, ["text.txt"])


def test_the_gguf_package_reads_it_and_no_path_is_inside(tmp_path: Path) -> None:
    path = write(tmp_path / "imatrix.gguf")
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].types == [gguf.GGUFValueType.UINT32]
    assert reader.fields["imatrix.datasets"].contents() == ["text.txt"]
    names = [tensor.name for tensor in reader.tensors]
    assert names == [
        "blk.0.attn_q.weight.in_sum2",
        "blk.0.attn_q.weight.counts",
        "blk.0.ffn_down.weight.in_sum2",
        "blk.0.ffn_down.weight.counts",
    ]
    assert [list(tensor.shape) for tensor in reader.tensors] == [[2, 1], [1, 1], [4, 1], [1, 1]]
    assert b"somewhere" not in path.read_bytes()


def test_two_writings_are_identical(tmp_path: Path) -> None:
    assert write(tmp_path / "a").read_bytes() == write(tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_experts_without_tokens_weigh_all_channels_alike(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "moe.gguf", "")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    writer.add_tensor("blk.0.ffn_up_exps.weight.in_sum2", np.array([[2.0, 4.0], [0.0, 0.0]], np.float32))
    writer.add_tensor("blk.0.ffn_up_exps.weight.counts", np.array([[2.0], [0.0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    values = read_imatrix(tmp_path / "moe.gguf").values
    assert np.array_equal(values["blk.0.ffn_up_exps.weight"], np.array([[1.0, 2.0], [1.0, 1.0]], np.float32))


def legacy(*, calls: int = 2, size: int = 3) -> bytes:
    name = b"blk.0.attn_q.weight"
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, size)
    return struct.pack("<i", 1) + entry + np.array([2, 4, 6], "<f4").tobytes() + struct.pack("<ii", 9, 3) + b"txt"


def test_the_older_format_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.dat").write_bytes(legacy())
    found = read_imatrix(tmp_path / "old.dat")
    assert np.array_equal(found.values["blk.0.attn_q.weight"], np.array([1, 2, 3], np.float32))
    assert (found.chunk_count, found.datasets) == (9, ["txt"])


@pytest.mark.parametrize("data", [b"", legacy(size=1 << 30), legacy(size=-1), legacy()[:20], struct.pack("<i", -5)])
def test_damaged_older_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "old.dat").write_bytes(data)
    with pytest.raises(RondelError, match=r"old\.dat"):
        read_imatrix(tmp_path / "old.dat")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 700), value=st.integers(0, 255), cut=st.integers(0, 700))
def test_damaged_files_are_refused_or_read(tmp_path: Path, at: int, value: int, cut: int) -> None:
    """Whatever single byte changes and wherever the file ends: an answer or the error for users, never another."""
    good = tmp_path / "good"
    data = bytearray((good if good.exists() else write(good)).read_bytes())
    data[at % len(data)] = value
    (tmp_path / "bad").write_bytes(data[: len(data) - cut % len(data)])
    try:
        found = read_imatrix(tmp_path / "bad")
    except RondelError:
        return
    assert all(np.isfinite(values).all() for values in found.values.values())


def test_sums_that_are_no_squares_are_refused(tmp_path: Path) -> None:
    sums = {"blk.0.attn_q.weight": (np.array([1.0, np.nan]), 1.0)}
    with pytest.raises(RondelError, match="NaN"):
        write_imatrix(tmp_path / "x", sums, datasets=[], chunk_size=1, chunk_count=1)
    assert not list(tmp_path.iterdir())
