"""blocks-<split>.b3: written with a dataset, verified and made again."""

import numpy as np
import pytest
from blake3 import blake3
from support.prepared import flip, tree
from support.streamed import read_blocks

from data_prep import check
from data_prep.checking import find_problems
from data_prep.store import fingerprints, manifest
from data_prep.store.blocks_file import blocks_problem, num_blocks
from data_prep.store.datasets import open_dataset


def test_it_has_the_digest_of_each_block_and_the_fingerprint_for_its_own(tiny_dataset):
    for name, split in manifest.load(tiny_dataset).splits.items():
        path = f"{tiny_dataset}/blocks-{name}.b3"
        (digest,) = read_blocks(path)
        tokens = open_dataset(tiny_dataset).splits[name].read(np.array([0]), split.num_tokens)[0]
        assert digest == blake3(tokens.tobytes()).digest()
        assert blake3(digest).hexdigest() == split.fingerprint
        assert blocks_problem(tiny_dataset, name, split) is None


def test_a_stream_of_several_blocks_has_a_digest_of_each():
    tokens = np.arange(2 * fingerprints.BLOCK_TOKENS + 5, dtype=np.uint16)
    digests = list(fingerprints.block_digests([tokens]))
    assert len(digests) == num_blocks(len(tokens)) == 3
    assert digests[2] == blake3(tokens[-5:].tobytes()).digest()


@pytest.mark.parametrize("how", ["missing", "flipped", "cut"])
def test_one_that_is_missing_or_damaged_is_found_and_made_again(words_copy, capsys, how):
    before, path = tree(words_copy), words_copy / "blocks-train.b3"
    if how == "missing":
        path.unlink()
    elif how == "flipped":
        flip(path)
    else:
        path.write_bytes(path.read_bytes()[:-1])
    (problem,) = find_problems(words_copy)
    assert str(problem).startswith(f"{path}: ")
    assert open_dataset(str(words_copy)).splits["train"].num_tokens  # training from files does without
    assert check.main([str(words_copy), "--num_workers=1"]) == 1
    assert check.main([str(words_copy), "--num_workers=1", "--repair"]) == 0
    assert f"{path}: made again from the stream" in capsys.readouterr().out
    assert tree(words_copy) == before


def test_one_of_a_split_that_is_not_there_is_left_over_from_something_else(words_copy):
    (words_copy / "blocks-test.b3").write_bytes(b"")
    (problem,) = find_problems(words_copy)
    assert "blocks-test.b3: not in the manifest" in str(problem)


def test_a_stream_that_is_not_the_manifests_is_not_called_a_repair(words_copy, capsys):
    from support.prepared import edit_manifest

    edit_manifest(words_copy, lambda fields: fields["splits"]["train"].update(fingerprint="0" * 64))
    assert check.main([str(words_copy), "--num_workers=1", "--repair"]) == 1
    assert "blocks-train.b3: the train stream has the fingerprint" in capsys.readouterr().err
