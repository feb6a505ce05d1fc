"""What checkpoints and data.json say, as JSON."""

import json

import pytest
from support.runs import make_metadata

from data_prep.store.files import digest_json
from gpt_pretrain.data.run import RunData, open_run
from gpt_pretrain.train.metadata import CheckpointMetadata


def without(fields, name):
    return {each: value for each, value in fields.items() if each != name}


def test_metadata_survives_json():
    metadata = make_metadata(5, tokenizer=None)
    again = CheckpointMetadata.from_json(json.loads(json.dumps(metadata.to_json())))
    assert again.to_json() == metadata.to_json()
    assert (again.step, again.model, again.plan, again.tokenizer) == (5, metadata.model, metadata.plan, None)
    assert again.ledger.digests.tolist() == [0, 1, 2, 3, 4]
    assert again.to_json()["examples_seen"] == 40


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_metadata_of_another_version_says_so(version):
    with pytest.raises(ValueError, match=rf"checkpoint metadata of version {version!r}, expected 1"):
        CheckpointMetadata.from_json(make_metadata(1).to_json() | {"version": version})
    with pytest.raises(ValueError, match="checkpoint metadata of version None"):
        CheckpointMetadata.from_json([])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["step", "seed", "model", "seq_len", "plan", "ledger", "tokenizer", "config"])
def test_missing_metadata_is_named(name):
    with pytest.raises(ValueError, match=f"checkpoint metadata: KeyError: '{name}'"):
        CheckpointMetadata.from_json(without(make_metadata(1).to_json(), name))


def test_metadata_whose_parts_are_of_another_version_or_kind_is_an_error():
    fields = make_metadata(1).to_json()
    for part, wrong in (
        ("model", fields["model"] | {"version": 2}),
        ("model", 3),
        ("plan", fields["plan"] | {"version": 2}),
        ("plan", {"version": 1, "segments": [{"rows": 3}]}),
        ("ledger", 3),
    ):
        with pytest.raises(ValueError):
            CheckpointMetadata.from_json(fields | {part: wrong})


def test_a_runs_data_survives_its_file_and_errors_name_it(tmp_path):
    data = RunData(str(tmp_path), make_metadata(1).plan, {"": "/data", "fingerprint": "/data"}, 40)
    data.write()
    assert open_run(tmp_path) == data
    path = tmp_path / "data.json"
    fields = json.loads(path.read_text())
    for wrong, message in (
        (fields | {"version": 2}, "version 2, expected 1: written by another version"),
        ([], "version None, expected 1"),
        (without(fields, "num_steps"), "num_steps is None"),
        (without(fields, "plan"), "data plan of version None, expected 1"),
        (fields | {"plan": fields["plan"] | {"version": 7}}, "data plan of version 7, expected 1"),
    ):
        if isinstance(wrong, dict):  # as if this version had written it
            wrong = {name: value for name, value in wrong.items() if name != "digest"}
            wrong |= {"digest": digest_json(wrong)}
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            open_run(tmp_path)
    path.write_text(json.dumps(fields | {"num_steps": 41}))
    with pytest.raises(ValueError, match=r"data\.json: was altered: its content has the digest"):
        open_run(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"data\.json: not valid JSON"):
        open_run(tmp_path)
