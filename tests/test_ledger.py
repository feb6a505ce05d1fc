import numpy as np
import pytest

from gpt_pretrain.data.ledger import FILE_NAME, MAGIC, Ledger

DIGESTS = [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]


def test_a_ledger_survives_its_file_and_its_text(tmp_path):
    for digests in (DIGESTS, []):
        ledger = Ledger(digests)
        ledger.write(tmp_path)
        assert Ledger.read(tmp_path).digests.tolist() == digests
        assert Ledger.from_text(ledger.to_text()).digests.tolist() == digests


def test_the_file_is_magic_and_eight_little_endian_bytes_a_step(tmp_path):
    Ledger(DIGESTS).write(tmp_path)
    content = (tmp_path / FILE_NAME).read_bytes()
    assert content == MAGIC + b"".join(digest.to_bytes(8, "little") for digest in DIGESTS)


def test_new_digests_are_put_in_when_they_are_those_of_whole_batches():
    ledger = Ledger([7])
    for partial in (1, 2**64 - 1):
        ledger.add(partial)
    assert len(ledger) == 3 and ledger.digests.tolist() == [7]
    assert Ledger.from_text(ledger.to_text()).digests.tolist() == [7]
    # Another process has the rest of the rows; sums are modulo 2**64.
    whole = ledger.take_new() + np.array([10, 11], np.uint64)
    ledger.extend(whole)
    assert ledger.digests.tolist() == [7, 11, 10]
    assert len(ledger) == 3 and len(ledger.take_new()) == 0


@pytest.mark.parametrize("content", [b"", b"GPTLEDG", b"GPTLEDG2" + bytes(8), MAGIC + bytes(12), b"{}"])
def test_a_file_that_is_no_ledger_is_an_error_that_says_what_to_do(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"ledger\.bin: {len(content)} bytes .*expected b'GPTLEDG1' and 8 bytes a step"
    ):
        Ledger.read(tmp_path)


def test_a_missing_ledger_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"ledger\.bin: no such file; expected the save_dir of a run"):
        Ledger.read(tmp_path)


def test_the_first_difference_is_looked_for_as_far_as_both_go():
    ledger = Ledger(DIGESTS)
    assert ledger.first_difference(Ledger(DIGESTS)) is None
    assert ledger.first_difference(Ledger(DIGESTS[:2])) is None and Ledger().first_difference(ledger) is None
    assert ledger.first_difference(Ledger([*DIGESTS[:3], 5, 6])) == 3
    assert Ledger([*DIGESTS[:3], 5]).first_difference(ledger) == 3
