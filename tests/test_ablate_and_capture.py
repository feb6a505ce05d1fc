"""Ablations have the numbers of the model with that one intervention; captures are its activations."""

import json
import struct

import jax
import numpy as np
import pytest
from support.inspected_run import prepare, simple_plan, stream, write_run
from support.models import make_spec
from support.runs import make_metadata

from data_prep.store.datasets import open_dataset
from gpt_pretrain import ablate, capture
from gpt_pretrain.history.ablation import run_of
from gpt_pretrain.history.opened_run import OpenedRun
from gpt_pretrain.history.rows import read_rows
from gpt_pretrain.model.gpt import init_params, model_of
from gpt_pretrain.model.intervening import Rows, doses_at, make_hook
from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.model.losses import token_nll
from gpt_pretrain.train.checkpoints import Checkpoints
from gpt_pretrain.train.step import split_tokens
from gpt_pretrain.train.weight_files import safetensors_file

SEQ_LEN, NUM_WINDOWS = 32, 5


@pytest.fixture(scope="module")
def run_and_params(tmp_path_factory):
    """(save_dir of a run with a checkpoint, its spec, its parameters, validation windows)."""
    folder = tmp_path_factory.mktemp("ablation")
    dataset = prepare(folder / "data")
    run = write_run(folder / "run", {"": dataset}, simple_plan(stream(dataset)))
    own = (Intervention("noise", strength=9.0),)  # is left out
    spec = make_spec(SEQ_LEN, interventions=own)
    params = jax.tree.map(lambda leaf: leaf * 5, init_params(spec, jax.random.key(0)))
    kept = Checkpoints(run)
    kept.save({"params": params}, make_metadata(3, spec=spec, seq_len=SEQ_LEN))
    kept.wait()
    kept.close()
    source = open_dataset(dataset).splits["val"]
    return run, spec, params, source.read(np.arange(NUM_WINDOWS) * SEQ_LEN, SEQ_LEN + 1)


def loss_with(spec, params, windows, intervention=None, watched=None):
    """Of the model with one intervention or none; and the mean of the activation at `watched`, (site, layer)."""
    given, means = [intervention] if intervention else [], {}
    inputs, targets = split_tokens(windows)
    doses = doses_at(1, given)
    rows = Rows(inputs, np.arange(len(inputs)), 0, 0)
    change = make_hook(given, spec.n_layer, spec.n_head, doses[0] if doses else None, rows)

    def hook(site, layer, x):
        if (site, layer) == watched:
            means[watched] = np.asarray(x, np.float64).mean((0, 1))
        return change(site, layer, x)

    model = model_of(spec)(params)
    nll, _ = token_nll(model(inputs, hook=hook), model.head_VD, targets, vocab_size=spec.vocab_size)
    return float(nll.mean()), means.get(watched)


def test_the_losses_are_those_of_the_model_with_one_intervention(run_and_params, tmp_path, capsys, monkeypatch):
    run, spec, params, windows = run_and_params
    monkeypatch.setattr("gpt_pretrain.history.ablation._TOKENS_AT_ONCE", 3 * SEQ_LEN)  # the last rows fill no batch
    arguments = [f"--checkpoint={run}", f"--tokens={NUM_WINDOWS * SEQ_LEN}", "--sites", "attn_heads", "mlp_hidden"]
    html, png = tmp_path / "a.html", tmp_path / "a.png"
    assert ablate.main([*arguments, "--jsonl", f"--html={html}", f"--png={png}"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 * 2 * spec.n_layer
    plain, _ = loss_with(spec, params, windows)
    for line in (lines[2], lines[5]):  # each kind, layer and site is among them
        place = {"sites": [line["site"]], "layers": [line["layer"]]}
        if line["kind"] == "zero":
            expected, _ = loss_with(spec, params, windows, Intervention("zero", **place))
        else:
            _, mean = loss_with(spec, params, windows, watched=(line["site"], line["layer"]))
            expected, _ = loss_with(spec, params, windows, Intervention("mean", vector=mean.tolist(), **place))
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert line["rise"] == pytest.approx(expected - plain, abs=1e-4)
    page = html.read_text()
    assert all(f"{line['rise']:+.4f}" in page for line in lines) and "zero" in page and "mlp_hidden" in page
    height, width = struct.unpack(">II", png.read_bytes()[16:24])[::-1]
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and width > height > 10 * spec.n_layer


def test_the_table_is_printed_with_noise_and_mistakes_are_refused_in_a_line(run_and_params, capsys):
    run = run_and_params[0]
    arguments = [f"--checkpoint={run}/checkpoints/3", "--tokens=64"]
    assert ablate.main([*arguments, "--kinds", "noise", "--dose=0.5", "--sites", "mlp_out"]) == 0
    output = capsys.readouterr().out
    assert "noise 0.5" in output and "layer 1" in output and "3 passes" in output
    for wrong, message in (
        ([*arguments, "--sites", "mlp"], "--sites: found 'mlp', expected one of 'block_in'"),
        ([*arguments, "--tokens=0"], "--tokens: found 0, expected at least 1"),
        (["--checkpoint=nowhere"], "nowhere: no such directory"),
    ):
        assert ablate.main(wrong) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_activations_are_captured_with_where_they_come_from(run_and_params, tmp_path, capsys):
    run, spec, params, _ = run_and_params
    out = tmp_path / "out.safetensors"
    arguments = [run, str(out), "--step=4", "--rows=1:4", "--sites", "mlp_hidden", "final_norm", "--layers", "-1"]
    assert capture.main(arguments) == 0
    assert "3 arrays of 3 rows of update 4" in capsys.readouterr().out
    file, metadata = safetensors_file.read(out)
    rows = read_rows(OpenedRun(run), 3, slice(1, 4))
    tokens = np.stack([row.tokens for row in rows])
    assert file.tensors.keys() == {"layers.1.mlp_hidden", "final_norm", "tokens"}
    assert np.array_equal(file.read("tokens"), tokens)
    seen = {}
    hook = lambda site, layer, x: (seen.setdefault((site, layer), x), x)[1]  # noqa: E731
    model_of(spec)(params)(split_tokens(tokens)[0], hook=hook)
    np.testing.assert_allclose(file.read("layers.1.mlp_hidden"), seen["mlp_hidden", 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(file.read("final_norm"), seen["final_norm", None], rtol=1e-4, atol=1e-4)
    facts = {name: json.loads(metadata[name]) for name in ("step", "rows", "positions", "streams", "checkpoint")}
    assert facts["step"] == 4 and facts["rows"] == [1, 2, 3]
    assert facts["positions"] == [row.position for row in rows] and facts["checkpoint"]["step"] == 3
    assert list(facts["streams"].values()) == [OpenedRun(run).plan.stages[0].streams[0].fingerprint]
    for wrong, message in (
        (["--sites", "mlp"], "--sites: found 'mlp'"),
        (["--layers", "7"], "--layers: no layer [7]; the model has 2"),
        (["--rows=9"], "--rows 9: the batch has the rows 0 to"),
        (["--step=999"], "--step 999"),
    ):
        assert capture.main([*arguments, *wrong]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_the_run_of_a_checkpoint_is_found_by_its_name():
    names = ("runs/a", "runs/a/checkpoints", "runs/a/checkpoints/300", "runs/a/checkpoints/300/")
    assert {run_of(name) for name in names} == {"runs/a"}
