"""A model's identity, by construction; and the spec as JSON."""

import dataclasses
import json

import jax
import pytest
from support.models import make_spec

from gpt_pretrain.model import spec as spec_lib
from gpt_pretrain.model.gpt import init_params
from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.model.spec import Architecture, GPTConfig, ModelSpec

# Another value for each field that is not part of the identity.
OTHERWISE = {
    "vocab_size": 200,
    "end_of_text": 3,
    "dtype": "bfloat16",
    "attention": "cudnn",
    "dropout": 0.5,
    "remat": "full",
    "logits_dtype": "bfloat16",
    "interventions": (Intervention("zero"),),
}


def shapes_of(spec):
    return jax.eval_shape(lambda: init_params(spec, jax.random.key(0)))


def test_the_identity_is_every_field_of_the_architecture_and_nothing_else():
    architecture = {field.name for field in dataclasses.fields(Architecture)}
    everything = {field.name for field in dataclasses.fields(ModelSpec)}
    assert set(make_spec().identity) == architecture
    assert everything - architecture == set(OTHERWISE), "is the new field one that shapes the parameters?"


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_not_part_of_the_identity_changes_no_parameter(name):
    spec = make_spec()
    other = dataclasses.replace(spec, **{name: OTHERWISE[name]})
    assert other != spec and other.identity == spec.identity
    assert shapes_of(other) == shapes_of(spec)


@pytest.mark.parametrize(
    "name, value",
    [
        ("n_layer", 1),
        ("n_head", 4),
        ("n_embd", 64),
        ("padded_vocab_size", 320),
        ("num_positions", 9),
        ("document_mask", True),
    ],
)
def test_each_field_of_the_architecture_makes_another_model(name, value):
    spec = make_spec()
    other = dataclasses.replace(spec, **{name: value})
    assert {each for each in spec.identity if other.identity[each] != spec.identity[each]} == {name}
    # Heads and the document mask leave the shapes as they are: only the identity tells these models apart.
    assert (shapes_of(other) == shapes_of(spec)) == (name in ("n_head", "document_mask"))


def test_a_field_added_to_the_architecture_counts_without_being_listed_anywhere(monkeypatch):
    added = dataclasses.make_dataclass(
        "Architecture", [("n_kv_head", int, 1)], bases=(Architecture,), frozen=True, kw_only=True
    )
    monkeypatch.setattr(spec_lib, "Architecture", added)

    def spec(n_kv_head):
        fields = {field.name: getattr(make_spec(), field.name) for field in dataclasses.fields(Architecture)}
        return added(**fields, n_kv_head=n_kv_head)

    assert spec(1).identity != spec(2).identity == spec(2).identity


def test_a_spec_survives_json_with_its_interventions():
    given = (Intervention("zero", layers=[-1]), Intervention("noise", strength=0.5, rows=[1, 2]))
    spec = make_spec(dropout=0.1, document_mask=True, interventions=given)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert "interventions" not in make_spec().to_json()
    fields = spec.to_json()
    for wrong in (3, [3], [{"version": 1, "kind": "zero", "layers": [2]}], [{"version": 1}]):
        with pytest.raises(ValueError, match="intervention"):
            ModelSpec.from_json(fields | {"interventions": wrong})


def test_another_version_and_fields_that_are_missing_or_not_known_are_errors():
    fields = make_spec().to_json()
    missing = {name: value for name, value in fields.items() if name != "n_head"}
    for wrong, message in (
        (fields | {"version": 2}, "model spec of version 2, expected 1"),
        ({name: value for name, value in fields.items() if name != "version"}, "model spec of version None"),
        (fields | {"rotary": True}, "model spec: .*rotary"),
        (missing, "model spec: .*n_head"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelSpec.from_json(wrong)


def test_settling_refuses_a_vocabulary_that_is_too_small():
    with pytest.raises(ValueError, match=r"model\.vocab_size=200 is smaller than the 257 ids"):
        GPTConfig(n_embd=32, n_head=2, vocab_size=200).settle("cpu", seq_len=8, vocab_size=257, end_of_text=256)


def test_a_plain_spec_is_the_same_model_without_what_only_training_needs():
    spec = make_spec(dropout=0.1, remat="dots", interventions=(Intervention("zero"),))
    plain = spec.plain(dtype="bfloat16")
    assert (
        plain.identity == spec.identity
        and plain.dtype == "bfloat16"
        and not plain.dropout
        and not plain.interventions
        and plain.remat == "none"
    )
