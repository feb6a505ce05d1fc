"""What stands in a file is data: it is never imported, called or evaluated, and it leads to no file elsewhere."""

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.inspected_run import prepare, simple_plan, stream, write_run
from support.prepared import edit_manifest
from support.texts import train_tokenizer_json

from data_prep import card, check, documents, fineweb
from data_prep.store import manifest
from data_prep.store.datasets import open_dataset
from data_prep.store.files import digest_json, read_note, write_note
from data_prep.store.tokenizers import recorded_tokenizer, safe_name, user_tokenizer
from gpt_pretrain import inspect

REPO = Path(__file__).parent.parent

# Where code may come from a name, and why that name is the user's.
ALLOWED = {
    ("gpt_pretrain/torch_data.py", "torch"): "tensors for other people's trainers; it loads nothing",
    ("gpt_pretrain/torch_data.py", "torch.distributed"): "likewise",
    ("gpt_pretrain/torch_data.py", "torch.utils.data"): "likewise",
    ("data_prep/engines/beam.py", "pickle"): "jobs and results between our own processes, each with a keyed digest",
    ("data_prep/store/bucket_clients.py", "import_module"): "gcsfs or s3fs, by the scheme of a URL",
    ("data_prep/store/tokenizers.py", "import_module"): "a class that the user typed: --tokenizer, data.tokenizer",
    ("gpt_pretrain/model/interventions.py", "import_module"): "a function that the user's .gin file or flag names",
    ("gpt_pretrain/flags.py", "literal_eval"): "whether a value that the user typed is a text",
}
FORBIDDEN = {
    "import_module",
    "__import__",
    "eval",
    "exec",
    "compile",
    "literal_eval",
    "run_path",
    "run_module",
    "exec_module",
}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "runpy", "torch"}


def test_nothing_that_is_read_is_imported_evaluated_or_unpickled():
    found = {}
    for package in ("data_prep", "gpt_pretrain"):
        for path in sorted((REPO / package).rglob("*.py")):
            name = path.relative_to(REPO).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                    for module in modules:
                        if module.partition(".")[0] in FORBIDDEN_MODULES:
                            found[name, module] = node.lineno
                if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                    found[name, "allow_pickle"] = node.lineno
                if isinstance(node, ast.Call):
                    called = node.func
                    called_name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                    of = ast.unparse(called.value) if isinstance(called, ast.Attribute) else ""
                    is_regex_or_jax = called_name == "compile" and of not in ("", "builtins")
                    if (called_name in FORBIDDEN and not is_regex_or_jax) or (of, called_name) == ("np", "load"):
                        found[name, called_name] = node.lineno
    assert found.keys() == ALLOWED.keys(), found


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    dataset = prepare(folder / "data")
    run = write_run(folder / "run", {"": dataset}, simple_plan(stream(dataset)))
    return Path(dataset), Path(run)


@pytest.fixture
def copy(good, tmp_path):
    """A dataset and a run of it, to be changed."""
    shutil.copytree(good[0], tmp_path / "data")
    shutil.copytree(good[1], tmp_path / "run")
    return tmp_path / "data", tmp_path / "run"


@pytest.mark.slow
def test_every_text_of_every_file_is_tried_as_code_and_as_a_path_and_never_obeyed(copy):
    """In a process of its own, in which importing or calling what a file says leaves a mark."""
    dataset, run = copy
    script = textwrap.dedent(
        """
        import contextlib, io, json, os, sys
        from pathlib import Path
        from data_prep import check, documents
        from data_prep.card.__main__ import main as card
        from data_prep.store.files import digest_json
        from gpt_pretrain import inspect
        from gpt_pretrain.data.ledger import Ledger
        from gpt_pretrain.data.plan import Plan
        from gpt_pretrain.model.interventions import Intervention
        from gpt_pretrain.train.metadata import CheckpointMetadata
        from data_prep.store.tokenizers import recorded_tokenizer
        from conftest import make_spec

        dataset, run = map(Path, sys.argv[1:])
        spec = make_spec(8, interventions=(Intervention("zero", sites=["mlp_out"]), Intervention("clip", limit=1.0)))
        plan = Plan.from_json(json.loads((run / "data.json").read_text())["plan"])
        metadata = CheckpointMetadata(run_id="a run", step=1, seed=0, model=spec, seq_len=8, plan=plan, ledger=Ledger(),
                                      tokenizer="byte", tokenizer_digest=None)

        def use_metadata(fields):
            found = CheckpointMetadata.from_json(fields)
            recorded_tokenizer(found.tokenizer or "gpt2", found.tokenizer_digest)

        def texts(value, path=()):
            if isinstance(value, str):
                yield path
            for key in (value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
                if not (isinstance(key, int) and key > 3):
                    yield from texts(value[key], (*path, key))

        def looks(path):
            if path.name == "manifest.json":
                yield documents.main, [str(dataset), "--token", "9", "--text"]
                yield card, [str(dataset)]
                yield check.main, [str(dataset), "--num_workers=1", "--repair"]
            yield inspect.main, [str(run), "--step", "3", "--rows", "0"]

        def attempt(main, arguments):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                try:
                    main(*arguments)
                except ValueError:
                    pass

        tried = 0
        for path in (dataset / "manifest.json", run / "data.json", None):
            content = json.dumps(metadata.to_json()) if path is None else path.read_text()
            for place in texts(json.loads(content)):
                if place[-1] == "digest" and len(place) == 1:
                    continue
                for value in ("trap:Tokenizer", "os:abort", "trap", "../trap.json", "__import__('trap')", "!!python/name:trap.T"):
                    fields = json.loads(content)
                    holder = fields
                    for key in place[:-1]:
                        holder = holder[key]
                    holder[place[-1]] = value
                    tried += 1
                    if path is None:
                        attempt(use_metadata, [fields])
                        continue
                    fields.pop("digest")
                    path.write_text(json.dumps(fields | {"digest": digest_json(fields)}))
                    for main, arguments in looks(path):
                        attempt(main, [arguments])
                    path.write_text(content)
        print("tried", tried)
        """
    )
    trap = dataset.parent / "trap.py"
    trap.write_text("open(__file__ + '.sprung', 'w').close()\nclass Tokenizer: pass\nT = Tokenizer\n")
    path = os.pathsep.join(map(str, (trap.parent, REPO, REPO / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", script, str(dataset), str(run)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=trap.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 200
    assert not Path(f"{trap}.sprung").exists()


def test_a_users_own_tokenizer_is_named_by_the_user_and_compared(copy, tmp_path, monkeypatch, capsys):
    dataset, run = copy
    (tmp_path / "mine.py").write_text(
        "from data_prep.store.tokenizers import ByteTokenizer\nclass Mine(ByteTokenizer): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    edit_manifest(dataset, lambda fields: fields["spec"].update(tokenizer="mine:Mine"))
    looks = (
        (documents.main, [str(dataset), "--token", "9", "--text"]),
        (inspect.main, [str(run), "--step", "3", f"--data_dir={dataset}"]),
    )
    for main, arguments in looks:
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert "'mine:Mine' is named in a file" in error and "--tokenizer" in error
        assert "mine" not in sys.modules
    for main, arguments in looks:
        assert main([*arguments, "--tokenizer=mine:Mine"]) == 0
        assert main([*arguments, "--tokenizer=gpt2"]) == 1
        assert "tokenizer gpt2: digest" in capsys.readouterr().err
    (dataset / "documents_train_000000.parquet").unlink()
    assert check.main([str(dataset), "--repair", "--num_workers=1"]) == 1
    assert "'mine:Mine' is named in a file" in capsys.readouterr().err
    assert check.main([str(dataset), "--repair", "--num_workers=1", "--tokenizer=mine:Mine"]) == 0


def test_a_tokenizers_file_is_looked_for_in_the_dataset_only(tmp_path):
    elsewhere = train_tokenizer_json(tmp_path / "tokenizer.json")
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    digest = user_tokenizer(elsewhere).digest
    with pytest.raises(ValueError, match=r"copy its file into the dataset's directory"):
        recorded_tokenizer(elsewhere, digest, dataset)
    (dataset / "tokenizer.json").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"nor a file in .*dataset"):
        recorded_tokenizer(elsewhere, digest, dataset)
    (dataset / "tokenizer.json").unlink()
    os.mkfifo(dataset / "tokenizer.json")
    with pytest.raises(ValueError, match=r"nor a file in .*dataset"):
        recorded_tokenizer(elsewhere, digest, dataset)
    (dataset / "tokenizer.json").unlink()
    shutil.copy(elsewhere, dataset)
    assert recorded_tokenizer(elsewhere, digest, dataset).digest == digest
    for name in ("os:abort", "../tokenizer.json\n:x", "", "gpt2:x", "tokenizer.jsonx:y"):
        with pytest.raises(ValueError, match="is named in a file"):
            safe_name(name, dataset)


@pytest.mark.parametrize(
    "name", ["../x.bin", "/etc/passwd", "a/b.bin", "..", ".", "", "manifest.json", ".work", "a\nb", "a\x1b", "a" * 300]
)
def test_a_shards_name_leads_nowhere_else(copy, name):
    edit_manifest(copy[0], lambda fields: fields["shards"][0].update(name=name))
    with pytest.raises(
        ValueError, match=r"manifest\.json: shards\[0\]: name is .*expected the name of a file"
    ) as error:
        manifest.load(copy[0])
    assert error.value.args[0].isprintable()


@pytest.mark.parametrize("field", ["num_tokens", "num_rows", "num_bytes"])
@pytest.mark.parametrize("value", [-1, True, 1.0, "1", None, 2**60, 10**300, [], {}])
def test_a_number_in_a_manifest_is_a_number(copy, field, value):
    edit_manifest(copy[0], lambda fields: fields["shards"][2].update({field: value}))
    with pytest.raises(
        ValueError, match=rf"manifest\.json: shards\[2\]\.{field} is .*expected a whole number of at least 0"
    ):
        open_dataset(str(copy[0]))


@pytest.mark.parametrize("kind", ["fifo", "link away", "directory", "device", "dangling"])
@pytest.mark.parametrize(
    "name", ["fineweb_train_000000.bin", "documents_train_000000.parquet", "documents_train_000001.index"]
)
def test_what_is_no_file_of_the_dataset_is_refused_at_once(copy, tmp_path, kind, name, capsys):
    path = copy[0] / name
    away = path.rename(tmp_path / "away")
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "link away":
            path.symlink_to(away)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            path.symlink_to(tmp_path / "nowhere")
    assert check.main([str(copy[0]), "--num_workers=1"]) == 1
    assert f"{path}: " in capsys.readouterr().out
    assert inspect.main([str(copy[1]), "--step", "3", f"--data_dir={copy[0]}"]) == 1 or name.endswith("index")
    assert documents.main([str(copy[0]), "--id", "<doc-60>"]) == int(name.endswith("index"))
    assert documents.main([str(copy[0]), "--token", "9", "--text"]) == 1 or name.endswith("index")


@pytest.mark.parametrize("name", ["manifest.json", "data.json", "ledger.bin", "dataset_info.json", "README.md"])
def test_a_fifo_in_place_of_any_small_file_is_not_waited_for(copy, name, capsys):
    folder = copy[1] if name in ("data.json", "ledger.bin") else copy[0]
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    inspect.main([str(copy[1]), "--step", "3", f"--data_dir={copy[0]}"])
    check.main([str(copy[0]), "--num_workers=1"])
    if name == "README.md":
        card.write_card(copy[0])
    else:
        captured = capsys.readouterr()
        assert f"{folder / name}: is a FIFO" in captured.out + captured.err


def test_what_is_written_replaces_a_planted_link_and_does_not_follow_it(copy, tmp_path, capsys):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    name = "documents_train_000000.parquet"
    (copy[0] / name).unlink()
    (copy[0] / f".{name}.partial").symlink_to(victim)
    assert check.main([str(copy[0]), "--repair", "--num_workers=1"]) == 0
    assert victim.read_text() == "precious"
    (copy[0] / name).unlink()
    (tmp_path / "work").mkdir()
    (copy[0] / ".work").symlink_to(tmp_path / "work")
    assert check.main([str(copy[0]), "--repair", "--num_workers=1"]) == 1
    assert ".work: is a link" in capsys.readouterr().err and not any((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    "path",
    [
        "reference://x.parquet",
        "simplecache::https://h/x.parquet",
        "memory://x.jsonl",
        "/dev/zero",
        "https://h/x.parquet::simplecache",
    ],
)
def test_repair_opens_no_input_that_a_manifest_must_not_name(copy, path, capsys):
    edit_manifest(copy[0], lambda fields: fields["spec"]["inputs"][0].update(path=path))
    (copy[0] / "documents_train_000000.parquet").unlink()
    assert check.main([str(copy[0]), "--repair", "--num_workers=1"]) == 1
    assert path in capsys.readouterr().err


def test_a_changed_note_is_no_note(tmp_path):
    path = tmp_path / "note.json"
    write_note(path, {"num": 3})
    assert read_note(path) == {"num": 3}
    for text in (path.read_text().replace("3", "4", 1), "{", "[]", "null", "[" * 100_000, '{"digest": 1}'):
        path.write_text(text)
        assert read_note(path) is None
    assert read_note(tmp_path / "nothing") is None


def test_changed_notes_of_an_interrupted_preparation_change_nothing_in_the_manifest(tmp_path, monkeypatch):
    """Every count in every note of a preparation that stopped before its manifest."""
    text = tmp_path / "a.jsonl"
    text.write_text("".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(200)))
    arguments = [
        f"--input={text}",
        "--tokenizer=byte",
        "--shard_tokens=1000",
        "--val_tokens=500",
        "--record_tokens=64",
        "--num_workers=1",
    ]
    assert fineweb.main([*arguments, f"--output_dir={tmp_path / 'whole'}"]) == 0

    def stop(*_):
        raise ValueError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.pipeline.save", stop)
        assert fineweb.main([*arguments, f"--output_dir={tmp_path / 'out'}"]) == 1
    changed = 0
    for path in (tmp_path / "out" / ".work").rglob("*.json"):
        note = json.loads(path.read_text())
        numbers = list(_numbers(note))
        for holder, key in numbers:
            holder[key] += 1
        changed += len(numbers)
        if path.parent.name == "shards":  # as well a forger's: the manifest is made of the files
            del note["digest"]
            note["digest"] = digest_json(note)
        path.write_text(json.dumps(note))
    assert changed > 20
    assert fineweb.main([*arguments, f"--output_dir={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()


def _numbers(value):
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        if type(value[key]) is int:
            yield value, key
        else:
            yield from _numbers(value[key])
