"""One safetensors file: read exactly, refused when damaged, never more memory than the file has."""

import json
import resource
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from entrenar.errors import DiskFullError, EntrenarError, FormatError
from entrenar.interop.safetensors_file import TensorReader, read_header, write_tensors

F32 = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}


def framed(header: object, data: bytes = bytes(32)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


DAMAGED = {
    "empty": b"",
    "cut in the length": b"abc",
    "header of 4 GB": struct.pack("<Q", 4 << 30) + b"{}",
    "header of 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "no JSON": framed(b"{{{{"),
    "overlapping offsets": framed({"a": F32, "b": F32 | {"data_offsets": [16, 48]}}, bytes(48)),
    "a gap": framed({"a": F32, "b": F32 | {"data_offsets": [64, 96]}}, bytes(96)),
    "offsets beyond the end": framed({"a": F32 | {"shape": [800], "data_offsets": [0, 3200]}}),
    "negative size": framed({"a": F32 | {"shape": [-8]}}),
    "size that overflows": framed({"a": F32 | {"shape": [1 << 40, 1 << 40]}}),
    "shape that disagrees": framed({"a": F32 | {"shape": [9]}}),
    "bytes left over": framed({"a": F32}, bytes(64)),
    "unknown dtype": framed({"a": F32 | {"dtype": "F33"}}),
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00" + bytes(64),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused(tmp_path, damage):
    """The message names the file."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(FormatError, match=r"model\.safetensors is not a valid safetensors file: "):
        read_header(path)


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path):
    """An error, in either way of reading."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(1000.0)}, path)
    entry = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FormatError, match=r"model\.safetensors ends in the middle of tensor a; was it changed"):
        TensorReader().read(path, "a", entry, torch.bfloat16)
    with pytest.raises(FormatError, match=r"model\.safetensors is not a valid safetensors file: .*"):
        TensorReader().read(path, "a", entry, torch.float32)


def test_writing_to_a_mapped_tensor_does_not_write_to_the_file(tmp_path):
    """The map is private: training on a loaded model leaves its file as it was."""
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(5000)})
    content = path.read_bytes()
    tensor = TensorReader().read(path, "a", read_header(path)["a"], torch.float32)
    tensor.zero_()
    assert path.read_bytes() == content


def test_a_file_that_is_replaced_leaves_what_was_read(tmp_path):
    """Files are replaced by rename, so a model that was loaded keeps its weights."""
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(5000)})
    tensor = TensorReader().read(path, "a", read_header(path)["a"], torch.float32)
    write_tensors(path, {"a": torch.zeros(5000)})
    assert tensor.eq(1).all()


def test_tensors_longer_than_a_block_are_read_whole(tmp_path, generator):
    """Blocks are joined without a seam, with and without a cast."""
    path = tmp_path / "model.safetensors"
    tensor = torch.randn(5_000_001, generator=generator)
    write_tensors(path, {"a": tensor, "scalar": torch.tensor(2.0), "empty": torch.empty(0, 3)})
    header = read_header(path)
    assert torch.equal(TensorReader().read(path, "a", header["a"], torch.float32), tensor)
    assert torch.equal(TensorReader().read(path, "a", header["a"], torch.bfloat16), tensor.bfloat16())
    assert TensorReader().read(path, "scalar", header["scalar"], torch.float32).item() == 2
    assert TensorReader().read(path, "empty", header["empty"], torch.float32).shape == (0, 3)
    assert header["a"].size_bytes == tensor.nbytes


def test_large_finite_numbers_are_no_infinity(tmp_path):
    """The quick test by a sum overflows here; the numbers are fine."""
    path = tmp_path / "model.safetensors"
    tensor = torch.full((4,), 3e38)
    write_tensors(path, {"a": tensor})
    assert torch.equal(TensorReader().read(path, "a", read_header(path)["a"], torch.float32), tensor)


def test_a_written_file_may_be_read_by_whom_other_files_may(tmp_path):
    """The rights of a file of weights are those of any file that is made here."""
    (tmp_path / "plain").write_bytes(b"")
    write_tensors(tmp_path / "weights", {"a": torch.zeros(2)})
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_is_said_to_be_full(tmp_path):
    """The library gives the system's error as text only; it becomes our type, and no file is left."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(DiskFullError, match=r"^no space left to write .*model\.safetensors"):
            write_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.fuzz
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_of_bytes_gives_a_value_or_our_error(tmp_path, data):
    """Flipped and cut files never raise anything else."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        for name, entry in read_header(path).items():
            TensorReader().read(path, name, entry, torch.float32)
    except EntrenarError as error:
        if "model.safetensors" not in str(error):
            raise
