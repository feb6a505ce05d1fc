"""What a run records of what made it."""

import json
import os
import pathlib
import subprocess

import pytest

from gpt_pretrain.train.provenance import Commit, DatasetIdentity, Provenance, commit_of


@pytest.fixture
def git(tmp_path, monkeypatch):
    """Runs git in a repository of its own, `tmp_path / "code"`."""
    for name in list(os.environ):
        if name.startswith("GIT_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))

    def run(*arguments: str) -> str:
        options = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "init.defaultBranch=main"]
        folder = tmp_path / "code"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["git", *options, *arguments], cwd=folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    run("init", "-q")
    return run


def package_in(folder: pathlib.Path) -> pathlib.Path:
    package = folder / "our_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    return package


def test_the_commit_is_that_of_the_code_wherever_the_process_runs(git, tmp_path, monkeypatch):
    package = package_in(tmp_path / "code")
    git("add", "-A")
    git("commit", "-qm", "x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=elsewhere, check=True)
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("GIT_DIR", str(elsewhere / ".git"))  # as in a git hook
    commit = commit_of(package)
    monkeypatch.delenv("GIT_DIR")
    assert commit == Commit(git("rev-parse", "HEAD"), is_dirty=False)
    (package / "notes.txt").write_text("a file that git does not follow")
    assert commit_of(package) == commit
    (package / "__init__.py").write_text("changed = True\n")
    assert commit_of(package) == Commit(commit.commit, is_dirty=True)


def test_an_installed_package_has_no_commit(git, tmp_path, monkeypatch):
    (tmp_path / "code" / "their_project.py").write_text("")
    git("add", "-A")
    git("commit", "-qm", "x")
    package = package_in(tmp_path / "code" / ".venv" / "lib" / "site-packages")
    assert commit_of(package) is None
    assert commit_of(package_in(tmp_path / "no_checkout")) is None
    monkeypatch.setenv("PATH", "/nonexistent")
    assert commit_of(package) is None


def test_a_checkout_without_a_commit_has_none(git, tmp_path):
    package = package_in(tmp_path / "code")
    git("add", "-A")
    assert commit_of(package) is None


def test_provenance_is_written_and_read_back(tmp_path):
    provenance = Provenance(
        datasets={"web": DatasetIdentity("/data/web", "abc", 1000, "gpt2"), "edu": DatasetIdentity("/e", "d", 5, None)},
        num_params=124,
        total_steps=9,
        device_kind="cpu",
        num_devices=4,
        num_processes=2,
        mesh={"data": 2, "fsdp": 2},
        python="3.11.7",
        versions={"jax": "0.10.2"},
        code=Commit("abc", True),
        interventions=("zero at mlp_out",),
    )
    for each in (provenance, Provenance(**{**vars(provenance), "code": None})):
        each.write(tmp_path)
        assert Provenance.read(tmp_path) == each
    fields = json.loads((tmp_path / "provenance.json").read_text())
    assert fields.pop("interventions") == ["zero at mlp_out"]  # older ones have none
    (tmp_path / "provenance.json").write_text(json.dumps(fields))
    assert Provenance.read(tmp_path).interventions == ()
    for broken, message in (
        (fields | {"version": 99}, "provenance of version 99, expected 1"),
        ({name: value for name, value in fields.items() if name != "mesh"}, "mesh"),
        (fields | {"surprise": 1}, "surprise"),
        (fields | {"interventions": "zero"}, "interventions is 'zero', expected a list"),
        ([], "provenance of version None"),
    ):
        (tmp_path / "provenance.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=rf"provenance\.json: .*{message}"):
            Provenance.read(tmp_path)
    with pytest.raises(ValueError, match=r"provenance\.json: .*No such file"):
        Provenance.read(tmp_path / "nowhere")
