"""What transformers itself makes of our folders, and we of its: `make test-exchange`, in an environment with torch."""

import dataclasses
import json

import numpy as np
import pytest
from support import texts
from support.weights import (
    COLUMNS,
    NUM_TIME,
    SHAPES,
    abstract_of,
    assert_same_params,
    ids,
    our_logits,
    params_of,
    recorded,
    relative_error,
    save_checkpoint,
)

from data_prep.pages.text import printable
from data_prep.store.tokenizers import user_tokenizer
from gpt_pretrain import generate
from gpt_pretrain.export import __main__ as export
from gpt_pretrain.train.pretrained import weights_of

pytestmark = pytest.mark.exchange


@pytest.fixture(scope="module", autouse=True)
def no_network():
    """Nothing here may need it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module", params=SHAPES)
def shape(request, tmp_path_factory):
    """(name, spec, parameters, a run's directory, its export)."""
    name = request.param
    spec, directory = SHAPES[name], tmp_path_factory.mktemp("shape")
    params = params_of(spec)
    run = save_checkpoint(directory / "run", spec, params)
    assert export.main([str(run), str(directory / "out"), "--to=hf"]) == 0
    return name, spec, params, run, directory / "out"


def test_logits_are_equal_and_those_that_were_recorded(shape, record_property):
    from support.record_transformers import logits_and_greedy

    name, spec, params, _, folder = shape
    logits, greedy = logits_and_greedy(folder)
    error = relative_error(our_logits(spec, params), logits)
    record_property("relative_error", error)
    print(f"{name}: logits differ by {error:.1e} of the largest")
    assert error < 1e-5
    known = recorded()[name]
    assert relative_error(logits[0, :, COLUMNS], np.array(known["logits"])) < 1e-5 and greedy == known["greedy"]


def test_greedy_text_is_what_generate_prints(shape, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, _, _, run, folder = shape
    prompt = "the c"
    status = generate.main([f"--checkpoint={run}", f"--prompt={prompt}", "--num_tokens=9", "--temperature=0"])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(tokenizer.eos_token + prompt, return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=9, do_sample=False)[0]
    text = tokenizer.decode(new, skip_special_tokens=True)
    assert status == 0 and capsys.readouterr().out == printable(text) + "\n" and len(text) > len(prompt)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_tying_and_every_parameter_arrive(shape, tmp_path, dtype):
    from transformers import AutoModelForCausalLM, GenerationConfig

    _, spec, params, run, _ = shape
    assert export.main([str(run), str(tmp_path / "out"), "--to=hf", f"--dtype={dtype}"]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info  # missing, unexpected, mismatched
    assert str(model.dtype) == f"torch.{dtype}" and model.lm_head.weight is model.transformer.wte.weight
    wanted = np.asarray(params["layers"][0]["mlp"]["up"]["kernel"].astype(dtype).astype("float32"))
    assert np.array_equal(model.transformer.h[0].mlp.c_fc.weight.detach().float().numpy(), wanted)
    assert model.config.n_positions == spec.num_positions
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == spec.end_of_text


@pytest.mark.parametrize("max_shard_size", ["50GB", "100KB"])
def test_what_transformers_saves_is_taken(shape, tmp_path, max_shard_size):
    from transformers import AutoModelForCausalLM

    _, spec, params, _, folder = shape
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    found = weights_of(str(tmp_path / "saved"), spec, abstract_of(params))
    assert_same_params(found, params, num_rows=spec.vocab_size)


def test_a_model_that_transformers_made_has_our_logits(tmp_path):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    spec = SHAPES["many heads"]
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=32, n_embd=32, n_layer=2, n_head=8, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "saved")
    params = weights_of(str(tmp_path / "saved"), spec, abstract_of(params_of(spec)))
    with torch.no_grad():
        theirs = model(torch.tensor(ids())).logits.numpy()
    assert relative_error(our_logits(spec, params), theirs) < 1e-5


def test_what_llmcs_exporter_writes_is_taken(tmp_path):
    """`write_model` of llm.c's train_gpt2.py, by its description, from a model of transformers."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    spec = SHAPES["many heads"]
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=257, n_positions=32, n_embd=32, n_layer=2, n_head=8, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    state = {name.removeprefix("transformer."): each.detach() for name, each in model.named_parameters()}
    state["wte.weight"] = torch.nn.functional.pad(state["wte.weight"], (0, 0, 0, 384 - 257))
    kinds = ("ln_1.weight ln_1.bias attn.c_attn.weight attn.c_attn.bias attn.c_proj.weight attn.c_proj.bias "
             "ln_2.weight ln_2.bias mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight mlp.c_proj.bias")  # fmt: skip
    names = ["wte.weight", "wpe.weight", *(f"h.{i}.{kind}" for kind in kinds.split() for i in range(2))]
    for dtype, version in ((torch.float32, 3), (torch.bfloat16, 5)):
        header = torch.zeros(256, dtype=torch.int32)
        header[:8] = torch.tensor([20240326, version, 32, 257, 2, 8, 32, 384])
        with open(tmp_path / "model.bin", "wb") as file:
            file.write(header.numpy().tobytes())
            for name in [*names, "ln_f.weight", "ln_f.bias"]:
                tensor = state[name].T if ".c_" in name and name.endswith("weight") else state[name]
                file.write(tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
        params = weights_of(str(tmp_path / "model.bin"), spec, abstract_of(params_of(spec)))
        with torch.no_grad():
            theirs = model.to(dtype).float()(torch.tensor(ids())).logits.numpy()
        assert relative_error(our_logits(spec, params), theirs) < 1e-5


def test_the_safetensors_library_reads_our_files_and_we_its(shape, tmp_path):
    from safetensors.numpy import load_file, save_file

    from gpt_pretrain.train.weight_files import safetensors_file

    *_, folder = shape
    ours, _ = safetensors_file.read(folder / "model.safetensors")
    theirs = load_file(folder / "model.safetensors")
    save_file(theirs, tmp_path / "again.safetensors", {"format": "pt"})
    again, _ = safetensors_file.read(tmp_path / "again.safetensors")
    assert {f"transformer.{name}" for name in ours.tensors} == theirs.keys()
    for name in ours.tensors:
        for file in (ours, again):
            assert np.array_equal(file.read(name), theirs[f"transformer.{name}"])


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_auto_tokenizer_gives_the_ids_of_our_tokenizer(name, tmp_path):
    from transformers import AutoTokenizer

    ours = user_tokenizer(name)
    sizes = {"vocab_size": ours.vocab_size, "padded_vocab_size": ours.vocab_size + 3, "end_of_text": ours.end_of_text}
    spec = dataclasses.replace(SHAPES["shallow"], **sizes)
    run = save_checkpoint(tmp_path / "run", spec, params_of(spec), tokenizer=name)
    assert export.main([str(run), str(tmp_path / "out"), "--to=hf"]) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    nasty = [text for key, text in texts.NASTY.items() if "surrogate" not in key and "1 MB" not in key]
    spaces = [" " * 5000, f"a{' ' * 999}b", "\n" * 300, "\t \t\n \r\n  end  ", "".join(map(chr, range(0x250)))]
    for text in [*nasty, *spaces, "a1漢字🙂русский العربية", *texts.random_texts(1000, seed=5)]:
        pieces = text.split("<|endoftext|>")
        wanted = ours.encode(pieces[0]).tolist()
        for piece in pieces[1:]:
            wanted += [ours.end_of_text, *ours.encode(piece).tolist()]
        found = theirs(text)["input_ids"]
        assert found == wanted, ascii(text)[:100]
        assert theirs.decode(found) == text
    assert (theirs.eos_token_id, len(theirs)) == (ours.end_of_text, ours.vocab_size)
    assert theirs.model_max_length == NUM_TIME
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == ours.vocab_size
