"""Weights leave for transformers and llm.c, and come from there, without a bit lost and without their code.

What transformers itself says is in `test_exchange_transformers.py` (`make test-exchange`); here it is recorded.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from support import texts
from support.hub_server import hub_of
from support.models import VOCAB_SIZE, make_spec, make_test_mesh
from support.runs import build_anew, run_config
from support.shared import made_once
from support.training_runs import REPO, environment
from support.weights import (
    COLUMNS,
    NUM_TIME,
    PROMPT,
    SHAPES,
    abstract_of,
    assert_same_params,
    our_logits,
    params_of,
    recorded,
    relative_error,
    save_checkpoint,
)

from data_prep.store.datasets import open_dataset
from data_prep.store.tokenizers import user_tokenizer
from gpt_pretrain.export import __main__ as export
from gpt_pretrain.export.checkpoint import Checkpoint
from gpt_pretrain.model.gpt import logical_axes
from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.model.sampling import sample
from gpt_pretrain.parallel.partition import param_shardings
from gpt_pretrain.train import checkpoints
from gpt_pretrain.train.pretrained import weights_of
from gpt_pretrain.train.record import write_record
from gpt_pretrain.train.train import state_of
from gpt_pretrain.train.weight_files import hub, safetensors_file, tensors
from gpt_pretrain.train.weight_files.names import TOKENS, shapes_of
from gpt_pretrain.train.weight_files.opened import open_weights

SPEC = SHAPES["many heads"]
DIGEST = user_tokenizer("byte").digest


@pytest.fixture(scope="module")
def params():
    return params_of(SPEC)


@pytest.fixture(scope="module")
def exports(tmp_path_factory, params):
    """A checkpoint ("run") and its exports, which nobody changes."""

    def make(directory):
        run = save_checkpoint(directory / "run", SPEC, params, tokenizer_digest=DIGEST)
        for to, dtype in (("hf", "float32"), ("hf", "bfloat16"), ("llmc", "float32"), ("llmc", "bfloat16")):
            assert export.main([str(run), str(directory / f"{to}-{dtype}"), f"--to={to}", f"--dtype={dtype}"]) == 0

    return made_once(tmp_path_factory, "exports", make)


@pytest.fixture
def folder(exports, tmp_path):
    """A copy of the folder of transformers, to be changed."""
    return shutil.copytree(exports / "hf-float32", tmp_path / "folder")


def imported(source, params, spec=SPEC, **kwargs):
    return weights_of(str(source), spec, abstract_of(params), **kwargs)


def refused(source, match, spec=SPEC, digest=None):
    """The words of the error, which is raised before a parameter is needed."""
    with pytest.raises(ValueError, match=match) as caught:
        weights_of(str(source), spec, None, digest)
    assert str(caught.value).startswith(f"from_pretrained={source}")
    return str(caught.value)


def edit(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


# Logits


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_that_transformers_gave(name):
    spec, known = SHAPES[name], recorded()[name]
    found = our_logits(spec, params_of(spec))[0, :, COLUMNS]
    assert relative_error(found, np.array(known["logits"])) < 1e-5


def test_greedy_tokens_are_those_that_transformers_gave():
    spec, known = SHAPES["shallow"], recorded()["shallow"]
    how = {"seq_len": NUM_TIME, "num_tokens": 10, "temperature": 0.0}
    assert sample(params_of(spec), spec, np.array(PROMPT), **how).tolist() == known["greedy"]


# Round trips


def test_a_folder_and_its_file_alone_give_the_same_bits_back_without_the_padding(exports, params):
    for source in (exports / "hf-float32", exports / "hf-float32" / "model.safetensors"):
        assert_same_params(imported(source, params, tokenizer_digest=DIGEST), params, num_rows=VOCAB_SIZE)


def test_llmcs_file_gives_the_same_bits_back_with_the_padding(exports, params):
    assert_same_params(imported(exports / "llmc-float32", params), params)


@pytest.mark.parametrize("to", ["hf", "llmc"])
def test_bfloat16_takes_half_the_room_and_rounds_each_number_once(exports, params, to):
    rounded = jax.tree.map(lambda a: a.astype("bfloat16").astype("float32"), params)
    num_rows = VOCAB_SIZE if to == "hf" else None
    assert_same_params(imported(exports / f"{to}-bfloat16", params), rounded, num_rows=num_rows)
    files = [exports / f"{to}-{dtype}" for dtype in ("float32", "bfloat16")]
    full, half = ((path / "model.safetensors" if to == "hf" else path).stat().st_size for path in files)
    assert 1.9 < full / half < 2.1


def test_a_folder_in_several_files_is_one(folder, params):
    file, _ = safetensors_file.read(folder / "model.safetensors")
    names, weight_map = list(file.tensors), {}
    for number, part in enumerate((names[:7], names[7:])):
        header, placed = safetensors_file.make_header({n: file.tensors[n].shape for n in part}, "float32", {})
        name = f"model-{number}.safetensors"
        tensors.write(folder / name, header, placed, ((n, file.read(n)) for n in part))
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same_params(imported(folder, params), params, num_rows=VOCAB_SIZE)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"model-1\.safetensors: no such file, but model\.safetensors\.index\.json names"
    ):
        imported(folder, params)
    index.write_text(json.dumps({"weight_map": {names[0]: "../elsewhere.safetensors"}}))
    refused(folder, r"names \.\./elsewhere\.safetensors; expected \.safetensors files beside it")


def test_weights_reach_a_mesh_in_parts_and_the_padding_is_zeros(exports, params, monkeypatch):
    shardings = param_shardings(params, make_test_mesh(1, 4), logical_axes)
    sizes, read = [], tensors.TensorFile.read

    def noting(self, name, index=()):
        part = read(self, name, index)
        if part.ndim == 2:
            sizes.append((name, part.size / np.prod(self.tensors[name].shape)))
        return part

    monkeypatch.setattr(tensors.TensorFile, "read", noting)
    for source, num_rows in (("hf-float32", VOCAB_SIZE), ("llmc-float32", None)):
        sizes.clear()
        found = weights_of(str(exports / source), SPEC, abstract_of(params, shardings))
        assert {name for name, _ in sizes} == {n for n, shape in shapes_of(SPEC).items() if len(shape) == 2}
        assert max(part for _, part in sizes) < 0.26  # of a matrix; 264 / 4 of 257 rows
        assert jax.tree.map(lambda a: a.sharding, found) == shardings
        assert_same_params(found, params, num_rows=num_rows)


def test_llmcs_file_is_what_its_source_says(exports, params):
    """Read by its definition: https://github.com/karpathy/llm.c, fill_in_parameter_sizes of train_gpt2.c."""
    content = (exports / "llmc-float32").read_bytes()
    header, values = np.frombuffer(content, "<i4", 256), np.frombuffer(content, "<f4", offset=1024)
    layers, width, rows = SPEC.n_layer, SPEC.n_embd, 384  # the next multiple of 128 after 264
    assert header[:8].tolist() == [20240326, 3, 32, VOCAB_SIZE, layers, SPEC.n_head, width, rows]
    assert not header[8:].any()
    sizes = {
        "wte": (rows, width), "wpe": (32, width), "ln1w": (layers, width), "ln1b": (layers, width),
        "qkvw": (layers, 3 * width, width), "qkvb": (layers, 3 * width), "attprojw": (layers, width, width),
        "attprojb": (layers, width), "ln2w": (layers, width), "ln2b": (layers, width),
        "fcw": (layers, 4 * width, width), "fcb": (layers, 4 * width), "fcprojw": (layers, width, 4 * width),
        "fcprojb": (layers, width), "lnfw": (width,), "lnfb": (width,),
    }  # fmt: skip
    there = {}
    for name, size in sizes.items():
        there[name], values = values[: np.prod(size)].reshape(size), values[np.prod(size) :]
    assert not len(values)
    layer = params["layers"][1]
    np.testing.assert_array_equal(there["wte"][:264], params["token_embedding"]["embedding"])
    assert not there["wte"][264:].any()
    np.testing.assert_array_equal(there["qkvw"][1], layer["attention"]["qkv"]["kernel"].T)
    np.testing.assert_array_equal(there["fcprojw"][1], layer["mlp"]["down"]["kernel"].T)
    np.testing.assert_array_equal(there["fcb"][1], layer["mlp"]["up"]["bias"])
    np.testing.assert_array_equal(there["ln2w"][1], layer["ln_2"]["scale"])
    np.testing.assert_array_equal(there["lnfb"], params["ln_f"]["bias"])


def test_a_run_starts_from_a_folder_and_the_card_says_what_a_run_saw(tiny_dataset, tmp_path):
    spec = make_spec(8, n_layer=1)
    save_checkpoint(tmp_path / "first", spec, params_of(spec), tokenizer_digest=DIGEST)
    assert export.main([str(tmp_path / "first"), str(tmp_path / "out"), "--to=hf"]) == 0
    save_dir = tmp_path / "run"
    config = run_config(tiny_dataset, save_dir, mesh=(1, 2), from_pretrained=str(tmp_path / "out"))
    built, start = build_anew(config)
    save_dir.mkdir()
    write_record(built, start)
    params = state_of(built, start, None, None).params
    assert_same_params(params, params_of(spec), num_rows=VOCAB_SIZE)

    steered = dataclasses.replace(spec, interventions=(Intervention("noise", strength=0.5), Intervention("zero")))
    save_checkpoint(save_dir, steered, params, step=5, plan=start.plan, tokenizer_digest=DIGEST)
    assert export.main([str(save_dir), str(tmp_path / "again"), "--to=hf"]) == 0
    card = (tmp_path / "again" / "README.md").read_text()
    assert f"| tokens seen | {5 * 8 * 8:,} |" in card and "made from `text.jsonl`" in card
    assert (
        "| interventions in training | noise at block\\_in, strength=0.5; zero at block\\_in. They are not in" in card
    )
    assert "| interventions in training | none |" in (tmp_path / "out" / "README.md").read_text()
    assert built.data.first.fingerprint in card and "| code | " in card and str(tmp_path) not in card


# Nothing is half there, and never all in memory


@pytest.mark.parametrize("to", ["hf", "llmc"])
def test_an_export_is_whole_or_absent_and_replaces_what_a_killed_one_left(exports, tmp_path, monkeypatch, capsys, to):
    out, partial = tmp_path / "new" / "out", tmp_path / "new" / ".out.partial"
    arguments = [str(exports / "run"), str(out), f"--to={to}"]
    num_written, write_one = [], tensors._write_one

    def full_disk(*given):
        num_written.append(1)
        if len(num_written) == 5:
            raise OSError(28, "No space left on device")
        assert partial.exists() and not out.exists()
        write_one(*given)

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "_write_one", full_disk)
        assert export.main(arguments) == 1 and "No space left on device" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []
    if to == "hf":
        partial.mkdir()
        (partial / "left").touch()
    else:
        partial.touch()
    assert export.main(arguments) == 0 and list(out.parent.iterdir()) == [out]
    assert to == "llmc" or not (out / "left").exists()
    assert export.main(arguments) == 1 and "out: is there already. Remove it" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["hf", "llmc"])
def test_an_export_holds_one_parameter_at_a_time(exports, tmp_path, monkeypatch, to):
    alive, most, restore = weakref.WeakSet(), [], checkpoints.restore_param

    class Noted(np.ndarray):
        __hash__ = object.__hash__

    def noting(*given):
        most.append(len(alive))
        array = np.array(restore(*given)).view(Noted)
        alive.add(array)
        return array

    monkeypatch.setattr(checkpoints, "restore_param", noting)
    assert export.main([str(exports / "run"), str(tmp_path / "out"), f"--to={to}"]) == 0
    assert len(most) == len(shapes_of(SPEC)) and max(most) <= 1


def test_what_others_cannot_be_is_refused_with_the_reason(exports, tmp_path, capsys, params):
    def said(*arguments):
        assert export.main([*map(str, arguments), "--to=hf"]) == 1
        return capsys.readouterr().err

    spec = make_spec(NUM_TIME, n_layer=1, document_mask=True)
    masked = save_checkpoint(tmp_path / "masked", spec, params_of(spec), tokenizer_digest=DIGEST)
    assert "data.document_mask, which keeps attention within a document" in said(masked, tmp_path / "out")
    assert export.main([str(masked), str(tmp_path / "out"), "--to=hf", "--drop_document_mask"]) == 0
    assert "attention was kept within documents" in (tmp_path / "out" / "README.md").read_text()
    assert "support.slow_tokenizers" in said(exports / "run", tmp_path / "own", "--tokenizer=support.slow_tokenizers:X")
    assert "digest" in said(exports / "run", tmp_path / "own", "--tokenizer=gpt2")
    unknown = save_checkpoint(tmp_path / "unknown", SPEC, params, tokenizer=None)
    assert "tokenizer gpt2: has 50257 ids and ends texts by 50256, the model" in said(unknown, tmp_path / "own")
    assert "no good checkpoint found" in said(tmp_path, tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_a_tokenizer_of_ones_own_is_written_if_it_says_how(exports, tmp_path, monkeypatch, capsys):
    text = (
        "from data_prep.store.tokenizers import ByteTokenizer\nclass Bytes(ByteTokenizer): to_tokenizer_json = None\n"
    )
    (tmp_path / "a_users_own.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [str(exports / "run"), str(tmp_path / "out"), "--to=hf", "--tokenizer=a_users_own:Bytes"]
    assert export.main(arguments) == 1 and "Give it a method to_tokenizer_json()" in capsys.readouterr().err


# The page


def blocks_of_the_page() -> list[str]:
    text = (REPO / "docs" / "exchange.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_plain_orbax_reads_a_checkpoint_as_the_page_says(exports, params):
    code, there = blocks_of_the_page()[0], "/home/me/runs/gpt2_124m/checkpoints/19073"
    assert there in code and len(code.strip().splitlines()) == 5
    names = {}
    exec(code.replace(there, str(exports / "run" / "checkpoints" / "3")), names)
    kernel = names["params"]["layers"]["1"]["mlp"]["up"]["kernel"]
    assert isinstance(kernel, np.ndarray) and np.array_equal(kernel, params["layers"][1]["mlp"]["up"]["kernel"])


def test_the_last_record_of_a_split_is_what_the_page_says(tiny_dataset):
    code, names = blocks_of_the_page()[1], {}
    exec(code.replace("data/fineweb-10BT", tiny_dataset), names)
    tokens, length = open_dataset(tiny_dataset).splits["train"], names["num_in_last"]
    assert 0 < length < 64
    assert names["last"].tolist() == tokens.read(np.array([tokens.num_tokens - length]), length)[0].tolist()


# What is not taken


def test_missing_unexpected_and_misshapen_tensors_are_named(folder):
    file, _ = safetensors_file.read(folder / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    shapes.pop("h.0.ln_1.bias")
    shapes |= {"h.0.attn.rotary": (3,), "h.1.mlp.c_fc.bias": (31,)}
    header, placed = safetensors_file.make_header(shapes, "float32", {})
    tensors.write(folder / "model.safetensors", header, placed, ((n, np.zeros(s)) for n, s in shapes.items()))
    words = refused(folder, "does not fit the model")
    for line in ("missing: h.0.ln_1.bias", "unexpected: h.0.attn.rotary", "h.1.mlp.c_fc.bias: is 31, expected 128"):
        assert f"\n  {line}" in words


@pytest.mark.parametrize("shapes", [{}, {TOKENS: ()}, {"wpe.weight": (3,), "h.x.y": (1,), TOKENS: (2, 2, 2)}])
def test_tensors_of_any_names_and_shapes_are_refused_in_words(folder, shapes):
    for more in ({}, {"lm_head.weight": ()}):
        header, placed = safetensors_file.make_header(shapes | more, "float32", {})
        (folder / "model.safetensors").write_bytes(header + bytes(100))
        refused(folder, "does not fit the model:\n  (missing: h.0.attn|lm_head.weight: differs)")


@pytest.mark.parametrize(
    "change, line",
    [
        ({"n_layer": 1}, "model.n_layer: the file has 2, this run has 1"),
        ({"n_embd": 64}, "model.n_embd: the file has 32, this run has 64"),
        ({"n_head": 4}, "model.n_head: the file has 8, this run has 4"),
        ({"num_positions": 16}, "model.block_size (positions): the file has 32, this run has 16"),
        (
            {"vocab_size": 256, "padded_vocab_size": 256},
            "model.vocab_size: the file has 257 tokens, this run has 256 rows",
        ),
        ({"vocab_size": 260}, "vocabulary: the file has 257 tokens, the data has 260"),
    ],
)
def test_weights_of_another_shape_are_refused_by_the_setting(exports, change, line):
    spec = dataclasses.replace(SPEC, **change)
    for source in ("hf-float32", "llmc-float32"):
        assert f"\n  {line}" in refused(exports / source, "does not fit the model", spec)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("activation_function", "relu", "activation_function is 'relu', expected 'gelu_new'"),
        ("n_inner", 100, "n_inner is 100, expected 4 . n_embd, which is 32"),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx .* is True, expected False"),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon .* is 1e-06, expected 1e-05"),
        ("model_type", "llama", "model_type .* is 'llama', expected 'gpt2'"),
        ("tie_word_embeddings", False, "tie_word_embeddings .* is False, expected True"),
    ],
)
def test_an_option_that_our_model_does_not_have_is_refused(folder, name, value, words):
    edit(folder / "config.json", lambda fields: fields.update({name: value}))
    refused(folder, words)


@pytest.mark.parametrize("is_tied", [True, False])
def test_an_output_embedding_is_taken_if_it_is_the_token_embedding(folder, params, is_tied):
    file, _ = safetensors_file.read(folder / "model.safetensors")
    arrays = {name: file.read(name) for name in file.tensors}
    arrays["lm_head.weight"] = arrays[TOKENS] + (0 if is_tied else np.eye(*arrays[TOKENS].shape))
    arrays["h.0.attn.bias"] = np.ones((1, 1, 4, 4))  # the mask that OpenAI's file on the Hub has
    header, placed = safetensors_file.make_header({n: a.shape for n, a in arrays.items()}, "float32", {})
    tensors.write(folder / "model.safetensors", header, placed, arrays.items())
    if is_tied:
        assert_same_params(imported(folder, params), params, num_rows=VOCAB_SIZE)
    else:
        refused(folder, "lm_head.weight: differs from wte.weight")


def test_ids_of_another_tokenizer_are_refused(exports):
    refused(
        exports / "hf-float32", "ids of a tokenizer .digest .*, the data has ids of the digest other", digest="other"
    )


@pytest.mark.parametrize("beginning", [b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_pickles_are_not_opened(folder, tmp_path, beginning):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(beginning + bytes(100))
    words = refused(path, "holds a pickle of torch, which runs code when it is opened, so it is not")
    assert "save_pretrained(DIR)" in words and "\n" not in words
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "holds a pickle of torch")


def test_damaged_files_are_refused_before_anything_is_read(exports, tmp_path):
    path = tmp_path / "weights.safetensors"
    good = (exports / "hf-float32" / "model.safetensors").read_bytes()
    length = int.from_bytes(good[:8], "little")
    for content, words in (
        (good[:-1], "in the file; it was cut short or written to"),
        (good[:100], "not a .safetensors file, or cut short"),
        (b"text", "not a .safetensors file, or cut short"),
        (good[:8] + b"[" + good[9:], "its header is no JSON"),
        (good[: 8 + length].replace(b"F32", b"I64") + good[8 + length :], "is of dtype 'I64', expected one of F32"),
        (good.replace(b'"data_offsets":[0,', b'"data_offsets":[-,'), "its header is no JSON"),
        (good.replace(b'"data_offsets":[0,', b'"data_offsets":[1,'), "expected 128 bytes in the file"),
    ):
        path.write_bytes(content)
        refused_words = refused_anywhere(path)
        assert words in refused_words and "\n" not in refused_words
    good = (exports / "llmc-float32").read_bytes()
    for content, words in (
        (good[:-4], "cut short or written to"),
        (good[:1000], "expected a header of 256 words"),
        (good[:4] + b"\1" + good[5:], "llm.c's version 1, expected 3 (float32) or 5 (bfloat16)"),
        (good[:8] + b"\xff" * 4 + good[12:], "num_positions -1"),
        (good[:24] + b"\xff\xff\xff\x7f" + good[28:], "which is no model"),
    ):
        path.write_bytes(content)
        assert words in refused_anywhere(path)


def refused_anywhere(path) -> str:
    with pytest.raises(ValueError) as caught:
        open_weights(str(path))
    return str(caught.value)


# The Hub


def fetched(url, endpoint, cache) -> str:
    """The folder that the real client gives, or the error: in a process of its own, as it reads the variables once."""
    code = (
        "import sys\nfrom gpt_pretrain.train.weight_files import hub\n"
        "try: print(hub.folder_of(sys.argv[1]))\nexcept ValueError as error: print(error)"
    )
    env = environment() | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run([sys.executable, "-c", code, url], env=env, text=True, capture_output=True).stdout.strip()


def test_a_models_id_is_fetched_by_the_hubs_client_once_and_pickles_are_left_there(
    folder, tmp_path, params, monkeypatch
):
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    with hub_of({"somebody/gpt2": folder}, {"gpt2": "somebody/gpt2"}) as (endpoint, sent):
        here = fetched("hf://gpt2", endpoint, tmp_path)
        assert sorted(sent) == ["config.json", "model.safetensors"]
        missing = fetched("hf://somebody/nothing", endpoint, tmp_path)
        assert "hf://somebody/nothing: cannot be downloaded (RepositoryNotFoundError" in missing
        assert "\n" not in missing and "hf download somebody/nothing" in missing
    assert fetched("hf://gpt2", endpoint, tmp_path) == here and len(sent) == 2  # no server any more
    monkeypatch.setattr(hub, "folder_of", {"hf://gpt2": Path(here)}.__getitem__)
    assert_same_params(imported("hf://gpt2", params), params, num_rows=VOCAB_SIZE)


@pytest.mark.parametrize("url", ["hf://", "hf://a/b/c", "hf://gpt2@", "hf://gpt 2", "hf://datasets/a/b"])
def test_what_is_no_models_id_is_refused_at_once(url):
    with pytest.raises(ValueError, match=r"^train\.from_pretrained: found .*, expected a model's id, as in hf://gpt2"):
        hub.check_url("train.from_pretrained", url)
    assert hub.check_url("x", "hf://openai-community/gpt2@main") == "hf://openai-community/gpt2@main"


# Tokenizers


@pytest.fixture(scope="module")
def gpt2_json():
    return tokenizers.Tokenizer.from_str(json.dumps(user_tokenizer("gpt2").to_tokenizer_json()))


def hard_texts() -> list[str]:
    nasty = [text for name, text in texts.NASTY.items() if "surrogate" not in name and "1 MB" not in name]
    spaces = [" " * 5000, f"a{' ' * 999}b", "\n" * 300, "\t \t\n \r\n  end  ", " \n "]
    characters = [
        "".join(map(chr, range(0x250))),
        "x \u2028\u2029\x1c\x1d\x1e\x1f\x85\u180e\u200b y",
        "a1漢字🙂русский العربية",
    ]
    return [*nasty, *spaces, *characters, *texts.random_texts(600, seed=3)]


def test_gpt2s_tokenizer_json_gives_tiktokens_ids(gpt2_json):
    import tiktoken

    ours = user_tokenizer("gpt2")
    encoding = ours._encoding
    assert isinstance(encoding, tiktoken.Encoding)
    for text in hard_texts():
        assert gpt2_json.encode(text).ids == encoding.encode(text, allowed_special="all"), ascii(text)[:100]
    assert gpt2_json.encode("a<|endoftext|>b").ids == [64, 50256, 65]
    assert gpt2_json.get_vocab_size() == ours.vocab_size


@pytest.mark.parametrize("scheme", texts.SCHEMES)
def test_other_schemes_have_a_tokenizer_json_too(scheme, tmp_path):
    path = tmp_path / "large.tiktoken"
    path.write_bytes(small_ranks())
    ours = user_tokenizer(f"{path}@{scheme}")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.to_tokenizer_json()))
    for text in hard_texts():
        text = text.replace("<|endoftext|>", "")
        assert theirs.encode(text).ids == ours.encode(text).tolist(), ascii(text)[:100]


def small_ranks() -> bytes:
    """The first 3,000 of GPT-2's ranks."""
    return b"".join(texts.RANKS.read_bytes().splitlines(keepends=True)[:3000])


def test_ranks_that_are_no_merges_are_refused(tmp_path):
    path = tmp_path / "odd.tiktoken"
    path.write_bytes(texts.format_ranks(texts.BYTES | {b"abc": 256}))
    with pytest.raises(
        ValueError, match=r"cannot be written as tokenizer\.json: token 256, b'abc', is not made of two"
    ):
        user_tokenizer(f"{path}@gpt2").to_tokenizer_json()


def test_a_users_tokenizer_json_is_written_with_the_ids_that_we_use(tmp_path):
    ours = user_tokenizer(texts.train_tokenizer_json(tmp_path / "tokenizer.json"))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.to_tokenizer_json()))
    assert theirs.encode("the cat sat").ids == ours.encode("the cat sat").tolist()
    assert theirs.encode("<|endoftext|>").ids == [ours.end_of_text]


def test_the_checkpoint_is_read_by_its_digest(exports, tmp_path, capsys):
    run = shutil.copytree(exports / "run", tmp_path / "run")
    checkpoint = Checkpoint.open(str(run))
    victim = max((checkpoint.path / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert export.main([str(run), str(tmp_path / "out"), "--to=llmc"]) == 1
    assert "no good checkpoint found" in capsys.readouterr().err and not (tmp_path / "out").exists()
