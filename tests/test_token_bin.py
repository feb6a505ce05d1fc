"""The .bin format: what is written comes back, what is damaged is refused in words."""

import numpy as np
import pytest

from data_prep.store.token_bin import Header, open_tokens, read_header, token_dtype, write_tokens

IDS = np.array([50256, 0, 1, 65535, 256], np.uint16)
LARGE_IDS = np.array([65536, 0, 200_018, 2**32 - 1, 7], np.uint32)


@pytest.mark.parametrize("ids", [IDS, LARGE_IDS], ids=["uint16", "uint32"])
@pytest.mark.parametrize("header, num_bytes", [("short", 12), ("llmc", 1024)])
def test_written_tokens_come_back_with_either_header(tmp_path, header, num_bytes, ids):
    path = tmp_path / "a.bin"
    write_tokens(path, [ids[:2], ids[:0], ids[2:]], 5, dtype=ids.dtype, header=header)
    assert read_header(path) == Header(5, num_bytes, ids.dtype)
    assert path.stat().st_size == num_bytes + ids.nbytes
    tokens = open_tokens(path)
    assert tokens.dtype == ids.dtype and tokens.shape == (5,)
    np.testing.assert_array_equal(tokens, ids)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_bytes_are_the_documented_ones(tmp_path):
    write_tokens(tmp_path / "a.bin", [np.array([0x0102], np.uint16)], 1)
    expected = (20240520).to_bytes(4, "little") + b"\x01\0\0\0" + b"\x01\0\0\0" + b"\x02\x01"
    assert (tmp_path / "a.bin").read_bytes() == expected
    write_tokens(tmp_path / "a.bin", [np.array([0x010203], np.uint32)], 1, dtype=np.uint32)
    expected = (20240801).to_bytes(4, "little") + b"\x07\0\0\0" + b"\x01\0\0\0" + b"\x03\x02\x01\0"
    assert (tmp_path / "a.bin").read_bytes() == expected


def test_ids_are_uint16_for_as_long_as_they_fit():
    sizes = {size: token_dtype(size).str for size in (257, 65_536, 65_537, 200_000)}
    assert sizes == {257: "<u2", 65_536: "<u2", 65_537: "<u4", 200_000: "<u4"}


@pytest.mark.parametrize("ids, dtype", [(IDS, np.uint32), (LARGE_IDS, np.uint16)])
def test_ids_of_another_type_are_never_cast(tmp_path, ids, dtype):
    with pytest.raises(AssertionError, match=str(ids.dtype)):
        write_tokens(tmp_path / "a.bin", [ids], 5, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_an_empty_file_of_tokens_opens(tmp_path):
    write_tokens(tmp_path / "a.bin", [], 0)
    assert len(open_tokens(tmp_path / "a.bin")) == 0


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    write_tokens(path, [IDS], len(IDS))
    before = path.read_bytes()

    def failing():
        yield IDS
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="on fire"):
        write_tokens(path, failing(), 10)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _damaged(content: bytes, how: str) -> bytes:
    words = np.frombuffer(content[:12], "<u4").copy()
    if how == "magic":
        words[0] = 7
    elif how == "version":
        words[1] = 2
    elif how == "longer":
        content += b"\0"
    elif how == "cut":
        return content[:-4]
    elif how == "header only":
        return content[:7]
    return words.tobytes() + content[12:]


@pytest.mark.parametrize(
    "how, message",
    [
        ("magic", "starts with 7, expected a magic number .*, 20240520 or 20240801"),
        ("version", "version 2, expected 1 after the magic number 20240520"),
        ("longer", r"should hold 22 bytes .* or 1034 bytes .*holds 23; it has the wrong length"),
        ("cut", r"5 tokens.* 22 bytes .* or 1034 bytes .*holds 18; it was cut short"),
        ("header only", "7 bytes, too short"),
    ],
)
def test_damage_is_named_with_the_file(tmp_path, how, message):
    path = tmp_path / "a.bin"
    write_tokens(path, [IDS], len(IDS))
    path.write_bytes(_damaged(path.read_bytes(), how))
    for reads in (read_header, open_tokens):
        with pytest.raises(ValueError, match=message) as error:
            reads(path)
        assert str(error.value).startswith(str(path))


def test_the_magic_number_of_the_other_type_does_not_fit_the_size(tmp_path):
    path = tmp_path / "a.bin"
    write_tokens(path, [LARGE_IDS], 5, dtype=np.uint32)
    content = path.read_bytes()
    path.write_bytes((20240520).to_bytes(4, "little") + content[4:])
    with pytest.raises(ValueError, match="version 7, expected 1 after the magic number 20240520"):
        read_header(path)
    path.write_bytes((20240520).to_bytes(4, "little") + b"\x01\0\0\0" + content[8:])
    with pytest.raises(ValueError, match=r"should hold 22 bytes .*holds 32; it has the wrong"):
        read_header(path)


def test_an_unknown_header_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one of short, llmc"):
        write_tokens(tmp_path / "a.bin", [], 0, header="long")
