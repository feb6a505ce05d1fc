"""The manifest: typed, read strictly, written byte for byte as before."""

import dataclasses
import json

import pytest
from support.prepared import byte_options, edit_manifest, run, words, write_parquet

from data_prep.store import manifest
from data_prep.store.files import digest_json
from data_prep.store.spec import Spec


def test_manifest_errors_tell_unfinished_from_foreign(tmp_path):
    with pytest.raises(ValueError, match=r"not a prepared dataset .no such directory"):
        manifest.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"not a prepared dataset .no manifest\.json in it"):
        manifest.load(tmp_path)
    (tmp_path / ".work").mkdir()
    with pytest.raises(
        ValueError, match=r"not finished .* same command .data_prep.fineweb or data_prep.convert. again"
    ):
        manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: not valid JSON"):
        manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format_version 99, expected 2"):
        manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format_version": 2}')
    with pytest.raises(ValueError, match="was altered: its content has digest"):
        manifest.load(tmp_path)
    fields = {"format_version": 2}
    (tmp_path / "manifest.json").write_text(json.dumps(fields | {"digest": digest_json(fields)}))
    with pytest.raises(ValueError, match="the spec is NoneType, expected an object"):
        manifest.load(tmp_path)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    write_parquet(folder / "a.parquet", words(100))
    assert run(*byte_options(folder, folder / "out")) == 0
    return folder / "out"


@pytest.fixture
def directory(good, tmp_path):
    (tmp_path / "manifest.json").write_bytes((good / "manifest.json").read_bytes())
    return tmp_path


def test_what_is_read_is_written_again_byte_for_byte(directory):
    before = (directory / "manifest.json").read_bytes()
    manifest.save(manifest.load(directory), directory)
    assert (directory / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda spec: spec.pop("tokenizer"), "the spec has no field tokenizer"),
        (lambda spec: spec.update(colour="red"), "the spec has the unknown field colour; known are source, inputs"),
        (lambda spec: spec.update(formats=["parquet"]), "spec: formats is .'parquet'., expected one or more of"),
        (lambda spec: spec.update(end_of_text=257), "spec: end_of_text is 257, expected an id below vocab_size 257"),
        (lambda spec: spec.update(record_tokens=0), "spec: record_tokens is 0, expected at least 1"),
        (
            lambda spec: spec.update(record_tokens="64"),
            "spec.record_tokens is '64', expected a whole number of at least 0",
        ),
        (lambda spec: spec.update(inputs=[{"size": 3}]), "spec: inputs has an entry without a path"),
        (
            lambda spec: spec.update(val_tokens=None),
            "spec: text_column 'text', val_tokens None and num_shards None contradict one another",
        ),
    ],
)
def test_a_spec_that_cannot_be_is_refused_with_the_file_and_the_field(directory, edit, message):
    edit_manifest(directory, lambda fields: edit(fields["spec"]))
    with pytest.raises(ValueError, match=rf"manifest\.json: {message}"):
        manifest.load(directory)


def test_only_shards_without_a_manifest_have_a_number_of_shards(good):
    spec = manifest.load(good).spec
    assert "num_shards" not in spec.to_json()
    bare = dataclasses.replace(spec, text_column=None, val_tokens=None)
    assert bare.to_json() == spec.to_json() | {"text_column": None, "val_tokens": None, "num_shards": None}
    for each in (spec, bare):
        assert Spec.from_json(json.loads(json.dumps(each.to_json()))) == each
    values = bare.to_json()
    del values["num_shards"]
    with pytest.raises(ValueError, match="the spec has no field num_shards"):
        Spec.from_json(values)
