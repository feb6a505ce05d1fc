"""The .bin format: what is written comes back, what is damaged is refused in words."""

import numpy as np
import pytest

from data_prep.token_bin import MAGIC, Header, open_tokens, read_header, write_tokens

IDS = np.array([50256, 0, 1, 65535, 256], np.uint16)


@pytest.mark.parametrize("header, num_bytes", [("short", 12), ("llmc", 1024)])
def test_written_tokens_come_back_with_either_header(tmp_path, header, num_bytes):
    path = tmp_path / "a.bin"
    write_tokens(path, [IDS[:2], IDS[:0], IDS[2:]], len(IDS), header=header)
    assert read_header(path) == Header(len(IDS), num_bytes)
    tokens = open_tokens(path)
    assert tokens.dtype == np.uint16 and tokens.shape == (5,)
    np.testing.assert_array_equal(tokens, IDS)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_bytes_are_the_documented_ones(tmp_path):
    write_tokens(tmp_path / "a.bin", [np.array([0x0102], np.uint16)], 1)
    expected = MAGIC.to_bytes(4, "little") + b"\x01\0\0\0" + b"\x01\0\0\0" + b"\x02\x01"
    assert (tmp_path / "a.bin").read_bytes() == expected


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
        ("magic", "starts with 7, expected the magic number 20240520"),
        ("version", "version 2"),
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


def test_an_unknown_header_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one of short, llmc"):
        write_tokens(tmp_path / "a.bin", [], 0, header="long")
