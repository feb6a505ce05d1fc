"""lm-evaluation-harness with our model and with its own `hf` model on our export: `make test-exchange`."""

import json

import numpy as np
import pytest
from support.local_tasks import write_tasks
from support.models import make_spec
from support.weights import params_of, save_checkpoint

from data_prep.store.tokenizers import ByteTokenizer
from gpt_pretrain import evaluate
from gpt_pretrain.export import __main__ as export
from gpt_pretrain.tasks.harness import HarnessTasks

pytestmark = pytest.mark.exchange


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    """Nothing here may need it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv(
            "DISABLE_MULTIPROC", "1"
        )  # the harness forks for standard errors, which JAX's threads do not survive
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return folder, write_tasks(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "document mask"])
def run(request, tmp_path_factory):
    """(a run's directory, its export, whether it was trained with the document mask)"""
    folder, mask = tmp_path_factory.mktemp("run"), request.param
    spec = make_spec(128, document_mask=mask)
    # A tenth, as logits of hundreds have few digits after the point.
    params = params_of(spec)
    params["token_embedding"]["embedding"] = 0.1 * params["token_embedding"]["embedding"]
    saved = save_checkpoint(folder / "run", spec, params)
    assert export.main([str(saved), str(folder / "out"), "--to=hf", "--drop_document_mask"]) == 0
    return saved, folder / "out", mask


def answers_of(model, folder, names):
    """(results, answers by task and example) of a model of the harness."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model, tasks=list(names), task_manager=manager, bootstrap_iters=100, log_samples=True)
    answers = {
        name: [sample["resps"] for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"])]
        for name in names
    }
    return found["results"], answers


def ours_of(saved, **changes):
    import jax

    from gpt_pretrain.parallel.mesh import make_mesh
    from gpt_pretrain.tasks.harness_model import HarnessModel
    from gpt_pretrain.tasks.task_model import TaskModel
    from gpt_pretrain.train.pretrained import load

    mesh = make_mesh(jax.devices())
    params, metadata = load(str(saved), mesh=mesh)
    model = TaskModel(metadata.model, mesh, ByteTokenizer(), **changes)
    model.params = params
    return HarnessModel(model)


def test_every_answer_is_that_of_the_harness_own_model(run, tasks, record_property):
    from lm_eval.models.huggingface import HFLM

    (saved, exported, _), (folder, names) = run, tasks
    theirs = HFLM(pretrained=str(exported), device="cpu", batch_size=4, dtype="float32")
    results, answers = answers_of(theirs, folder, names)
    # Without end-of-text before them, as `hf` asks; one document at a time, so the mask makes no difference.
    our_results, our_answers = answers_of(ours_of(saved, end_of_text_first=False), folder, names)
    for name in names:
        largest = 0.0
        for ours, hf in zip(our_answers[name], answers[name], strict=True):
            if name == "local_completion":
                assert ours == hf
                continue
            for (our,), (their,) in zip(ours, hf, strict=True):
                our, their = (each if isinstance(each, tuple) else (each, None) for each in (our, their))
                value, expected = float(our[0]), float(their[0])
                largest = max(largest, abs(value - expected))
                # Sums over hundreds of tokens are thousands of nats, which float32 knows to 1e-4 at best.
                assert abs(value - expected) < max(1e-4, 1e-6 * abs(expected)) and our[1] == their[1]
        record_property(name, largest)
        print(f"{name}: log-likelihoods differ by {largest:.1e}; {our_results[name]}; hf {results[name]}")
    for name in names:
        for metric, value in results[name].items():
            if "," in metric and "stderr" not in metric and isinstance(value, float):
                assert our_results[name][metric] == pytest.approx(value, rel=1e-5), (name, metric)
    assert len({text for example in answers["local_completion"] for (text,) in example}) > 3
    assert any("ee" not in text for example in answers["local_completion"] for (text,) in example)


def test_contexts_begin_with_end_of_text_where_the_document_mask_was_on(run, tasks):
    (saved, _, mask), (folder, _) = run, tasks
    default, plain, first = (
        answers_of(ours_of(saved, end_of_text_first=first), folder, ["local_choice", "local_rolling"])[1]
        for first in (None, False, True)
    )
    assert default["local_choice"] == (first if mask else plain)["local_choice"] and plain != first
    assert default["local_rolling"] == plain["local_rolling"] == first["local_rolling"]  # begins so in any case


def test_the_command_keeps_what_the_harness_says(run, tasks, tmp_path, capsys):
    (saved, *_), (folder, names) = run, tasks
    arguments = [
        str(saved),
        f"--tasks={','.join(names)}",
        f"--include_path={folder}",
        f"--output={tmp_path / 'out.json'}",
    ]
    assert evaluate.main(arguments) == 0
    theirs = json.loads((tmp_path / "out.json").read_text())
    (path,) = (saved / "evaluations").glob("3-*.json")
    kept = json.loads(path.read_text())
    path.unlink()
    assert kept["results"].keys() == set(names) and theirs["config"]["model"] == "HarnessModel"
    assert theirs["n-shot"]["local_letter"] == 2 and kept["lm_eval"] == theirs["lm_eval_version"]
    for name in names:
        for metric, value in kept["results"][name].items():
            assert theirs["results"][name][f"{metric},none"] == value
    printed = capsys.readouterr().out
    assert f"{kept['results']['local_choice']['acc']:.4f}" in printed


def test_the_same_tasks_can_be_asked_again(run, tasks):
    """As in a training run: loaded once."""
    (saved, *_), (folder, names) = run, tasks
    loaded = HarnessTasks(names[:2], include_path=str(folder), limit=5)
    model = ours_of(saved)._model
    first, second = (loaded.evaluate(model)["results"] for _ in range(2))
    assert first == second and np.isfinite(first["local_choice"]["acc,none"])


def test_tasks_are_asked_while_a_run_goes_on(tasks, tiny_dataset, tmp_path):
    from support.training_runs import flags, train_here

    folder, _ = tasks
    asked = {"train.eval_tasks": (str(folder / "local_choice.yaml"),), "train.eval_tasks_interval": 3}
    train_here(flags(tiny_dataset, tmp_path / "run", num_steps=16, **{"data.seq_len": 128}, **asked))
    steps = {int(path.name.split("-")[0]) for path in (tmp_path / "run" / "evaluations").iterdir()}
    assert steps == {3, 4}  # of sequences four times as long as `flags` counts


@pytest.mark.parametrize(
    "name, problem",
    [
        ("hellaswagg", "knows none of this name; near it are hellaswag"),
        ("none.yaml", "'none.yaml': cannot be loaded"),
        ("hellaswag", "'hellaswag': cannot be loaded"),  # its data is not here, and there is no network
    ],
)
def test_tasks_that_cannot_be_loaded_are_refused_in_a_line(run, name, problem, capsys):
    saved, *_ = run
    assert evaluate.main([str(saved), f"--tasks={name}"]) == 1
    error = capsys.readouterr().err
    assert problem in error and error.strip().count("\n") == 0


def test_ways_of_generating_that_we_do_not_have_are_refused():
    from gpt_pretrain.tasks.harness_model import _how

    assert _how({"until": "a", "max_new_tokens": 3, "temperature": 0.7}, 256) == (
        3,
        ["a"],
        {"temperature": 0.7, "top_k": 0, "top_p": 1.0},
    )
    assert _how({"until": ["a"], "do_sample": False, "temperature": 0.7}, 256)[2]["temperature"] == 0.0
    assert _how({}, 256) == (256, [], {"temperature": 0.0, "top_k": 0, "top_p": 1.0})
    with pytest.raises(ValueError, match="found num_beams; expected until"):
        _how({"num_beams": 4}, 256)
