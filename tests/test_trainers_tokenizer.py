"""The trainer imports the tokenizer that its user names, no other, and compares digests wherever two meet."""

import dataclasses
import shutil
import sys

import jax
import pytest
from support.models import TINY_MODEL
from support.prepared import edit_manifest

from gpt_pretrain import settings
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.train import pretrained, start
from gpt_pretrain.train.metadata import CheckpointMetadata
from gpt_pretrain.train.opened_data import open_data


def config_of(**changes):
    bindings = {
        "data.seq_len": 32,
        "train.batch_size": 8,
        "train.num_tokens": 2560,
        "train.sample_prompt": "'the cat'",
        **{f"model.{name}": value for name, value in TINY_MODEL.items()},
        **changes,
    }
    settings.parse([], [f"{name} = {value}" for name, value in bindings.items()])
    return settings.train_config()


@pytest.fixture
def foreign(tiny_dataset, tmp_path, monkeypatch):
    """A dataset by somebody's own class, which is a byte tokenizer."""
    dataset = tmp_path / "foreign"
    shutil.copytree(tiny_dataset, dataset)
    edit_manifest(dataset, lambda fields: fields["spec"].update(tokenizer="somebodys:Bytes"))
    text = "from data_prep.store.tokenizers import ByteTokenizer\nclass Bytes(ByteTokenizer): pass\n"
    for name in ("somebodys", "my_own"):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return str(dataset)


def test_what_a_dataset_names_is_not_imported_and_what_the_user_names_is_compared(foreign):
    directory = {"data.dir": repr(foreign)}
    with pytest.raises(ValueError, match=r"'somebodys:Bytes' is named in a file.*data\.tokenizer"):
        open_data(config_of(**directory))
    assert open_data(config_of(**directory, **{"train.sample_prompt": None})).prompts == ()  # nobody asked for text
    data = open_data(config_of(**directory, **{"data.tokenizer": "'my_own:Bytes'"}))
    assert [bytes(each.tolist()) for each in data.prompts] == [b"the cat"]
    for prompt in ("'the cat'", None):
        with pytest.raises(ValueError, match="tokenizer gpt2: digest"):
            open_data(config_of(**directory, **{"data.tokenizer": "'gpt2'", "train.sample_prompt": prompt}))
    assert "somebodys" not in sys.modules and "my_own" in sys.modules


def test_datasets_checkpoints_and_weights_of_another_tokenizer_are_refused(tiny_dataset, tmp_path, monkeypatch):
    config = config_of(**{"data.dir": repr(tiny_dataset)})
    data = open_data(config)
    metadata = CheckpointMetadata(
        run_id="a run",
        step=2,
        seed=config.seed,
        model=start.model_spec(config, data, jax.devices()[0]),
        seq_len=32,
        plan=start.Start.anew(data).plan,
        ledger=Ledger([1, 2]),
        tokenizer="byte",
        tokenizer_digest=data.first.tokenizer_digest,
    )
    assert CheckpointMetadata.from_json(metadata.to_json()).tokenizer_digest == data.first.tokenizer_digest
    other = dataclasses.replace(metadata, tokenizer_digest="other")
    for changes in ({}, {"train.fork": True}):
        config = config_of(**{"data.dir": repr(tiny_dataset)}, **changes)
        assert start._continued(metadata, config, data) == metadata.plan
        with pytest.raises(ValueError, match="tokenizer: the checkpoint has the digest other, the data of this run"):
            start._continued(other, config, data)
    monkeypatch.setattr(pretrained.checkpoints, "locate", lambda directory: directory)
    monkeypatch.setattr(pretrained.checkpoints, "read_metadata", lambda _: other)
    with pytest.raises(ValueError, match=r"from_pretrained=run: was trained on ids of tokenizer 'byte' .digest other"):
        pretrained.weights_of("run", metadata.model, None, data.first.tokenizer_digest)
