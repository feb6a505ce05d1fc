"""W&B over several sessions of one run: one history with one row a logged step, whatever was killed when."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys

import pytest
from PIL import Image

from gpt_pretrain.train.writers.heat_maps import NAME, pictures_of
from gpt_pretrain.train.writers.wandb_rows import FILE_NAME, records_in

# Steps START + 1 to END, two at a time logged with validation, statistics and samples as a run does; a checkpoint every
# 4 steps, of which the last two stay; killed after KILL, a moment later if SECS says so.
SESSION = """
import os, signal, sys, time
from gpt_pretrain.train.writers.wandb import WandbWriter
from gpt_pretrain.train.writers import make_writer
from gpt_pretrain.train.writers.references import Reference
save_dir, start, end, kill, secs, config = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5]), sys.argv[6]
WandbWriter.FILE_INTERVAL_SECS = 0.5 if secs else 60.0
there = [Reference("dataset-1", "dataset", "data", "gs://bucket/data", "f" * 64, {"fingerprint": "f" * 64})]
def saved(step):
    name = f"file:///run/checkpoints/{step}"
    there[1:] = [*there[1:], Reference("checkpoints-1", "model", str(step), name, f"{step:064}", {"step": step})][-2:]
if start:
    saved(start)
writer = make_writer(["wandb"], save_dir=save_dir, total_steps=99, start_step=start, config_text=config,
                     settings={"train": {"seed": 0, "batch": (1, 2)}}, sample_prompts=("a", "b"),
                     references=lambda: tuple(there))
for step in range(start + 1, end + 1):
    if step % 4 == 1:
        writer.write_scalars(step, {"statistics/activations/0/mlp_out/rms": step * 0.25})
    if step % 2 == 0:
        writer.write_scalars(step, {"train/loss": step * 1.5, "train/accuracy": 0.5})
    if step % 4 == 0:
        writer.write_texts(step, {"samples/1": f"a{step}", "samples/2": f"b{step}"})
        writer.flush()
        saved(step)
        writer.write_scalars(step, {"validation/loss": step * 2.0})
    if step == kill:
        time.sleep(secs + 0.2)
        os.kill(os.getpid(), signal.SIGKILL)
writer.close()
"""


def session(save_dir, start: int, end: int, *, kill: int = 0, secs: float = 0.0, config: str = "a.b = 1\n") -> str:
    """Trains from step `start` on; what it prints."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", SESSION, str(save_dir), *map(str, (start, end, kill, secs, config))],
        env=env | {"WANDB_MODE": "offline", "HOME": "/nonexistent"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr
    return done.stdout


def folders(save_dir) -> list[pathlib.Path]:
    return sorted(pathlib.Path(save_dir).glob("wandb/offline-run-*"))


def rows(save_dir) -> list[dict]:
    """Of all sessions, in the order in which `wandb sync` uploads them; tables and pictures as what is in their files."""
    found = []
    for folder in folders(save_dir):
        for record in records_in(next(folder.glob("*.wandb"))):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in items}
                files = {name: folder / "files" / row[f"{name}/path"] for name in MEDIA if f"{name}/path" in row}
                row = {name: value for name, value in row.items() if not name.startswith(MEDIA)}
                found.append(row | {name: read(file) for name, file in files.items()})
    return found


MEDIA = ("samples", "statistics/heat_map")


def read(file: pathlib.Path):
    if file.suffix == ".json":
        table = json.loads(file.read_text())
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return Image.open(file).convert("RGB").tobytes()


def artifacts(save_dir) -> list[tuple]:
    """(kind, name, aliases, metadata, place, digest) of those that refer to something."""
    found = []
    for folder in folders(save_dir):
        for record in records_in(next(folder.glob("*.wandb"))):
            if record.WhichOneof("record_type") == "artifact" and record.artifact.type != "run_table":
                each = record.artifact
                (entry,) = each.manifest.contents
                assert not entry.local_path and not entry.size  # nothing to upload
                found.append((each.type, each.name, json.loads(each.metadata), entry.ref, entry.digest))
    return found


def expected(last: int) -> list[dict]:
    made = []
    for step in range(1, last + 1):
        row = {"step": step, "_step": step}
        if step % 4 == 1:
            statistics = {"statistics/activations/0/mlp_out/rms": step * 0.25}
            row |= statistics | {NAME: pictures_of(statistics)[NAME].tobytes()}
        row |= {"train/loss": step * 1.5, "train/accuracy": 0.5} if step % 2 == 0 else {}
        if step % 4 == 0:
            row["validation/loss"] = step * 2.0
            row["samples"] = [{"step": step, "prompt": each, "text": f"{each}{step}"} for each in "ab"]
        made += [row] if len(row) > 2 else []
    return made


def without_times(found: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in ("_runtime", "_timestamp")} for row in found]


@pytest.mark.parametrize("secs", [0.0, 1.0], ids=["killed-before-its-rows-are-on-disk", "killed-after"])
def test_killed_and_resumed_sessions_make_one_history(tmp_path, secs):
    session(tmp_path, 0, 20, kill=11, secs=secs)  # the last checkpoint is that of step 8
    session(tmp_path, 8, 20, kill=17, secs=secs)
    session(tmp_path, 16, 20)
    assert without_times(rows(tmp_path)) == expected(20)
    assert len({folder.name.rpartition("-")[2] for folder in folders(tmp_path)}) == 1  # one W&B run
    found = artifacts(tmp_path)
    dataset = ("dataset", "dataset-1", {"fingerprint": "f" * 64}, "gs://bucket/data", "f" * 64)
    saved = {
        step: ("model", "checkpoints-1", {"step": step}, f"file:///run/checkpoints/{step}", f"{step:064}")
        for step in (4, 8, 12, 16, 20)
    }
    assert dataset in found and all(each == dataset or each in saved.values() for each in found)
    assert [each for each in found if each != dataset][-2:] == [saved[16], saved[20]]  # the last session knows them
    assert not secs or {step for step, each in saved.items() if each in found} == saved.keys()


@pytest.mark.slow
def test_a_session_that_ends_well_is_continued(tmp_path):
    session(tmp_path, 0, 8)
    said = session(tmp_path, 8, 12)
    assert without_times(rows(tmp_path)) == expected(12)
    assert "keeps those rows" not in said


@pytest.mark.slow
def test_rows_after_the_checkpoint_stay_and_that_is_said(tmp_path):
    session(tmp_path, 0, 10)
    assert "has steps 9 to 10 from an earlier session and keeps those rows" in session(tmp_path, 8, 12)
    assert without_times(rows(tmp_path)) == expected(12)


@pytest.mark.slow
def test_rows_that_were_uploaded_and_removed_are_not_logged_again(tmp_path):
    session(tmp_path, 0, 10)
    for folder in folders(tmp_path):
        subprocess.run(["rm", "-r", folder], check=True)
    session(tmp_path, 8, 14)
    assert without_times(rows(tmp_path)) == expected(14)[len(expected(10)) :]


@pytest.mark.slow
def test_a_run_begun_anew_under_other_settings_is_another_wandb_run(tmp_path):
    def ids():
        return [folder.name.rpartition("-")[2] for folder in folders(tmp_path)]

    session(tmp_path, 0, 8, kill=3, secs=1.0)  # before there was a checkpoint
    session(tmp_path, 0, 8)
    assert without_times(rows(tmp_path)) == expected(8) and len(set(ids())) == 1
    session(tmp_path, 0, 8, config="a.b = 2\n")
    assert len(set(ids())) == 2
    assert without_times(rows(tmp_path)) == [*expected(8), *expected(8)]


@pytest.mark.slow
def test_the_line_to_upload_names_the_folders_of_all_sessions(tmp_path):
    save_dir = tmp_path / "it's a run"
    session(save_dir, 0, 8, kill=5, secs=1.0)
    session(save_dir, 4, 8)
    said = session(save_dir, 8, 12)
    line = said.split("upload with: ")[1].splitlines()[0].split(" | ")[0]
    assert line.startswith("wandb sync ")
    told = subprocess.run(["sh", "-c", line.replace("wandb sync", "printf '%s\\n'")], capture_output=True, text=True)
    assert [pathlib.Path(each) for each in told.stdout.splitlines()] == folders(save_dir)
    assert len(folders(save_dir)) == 3
    wandb = pathlib.Path(sys.executable).with_name("wandb")
    asked = subprocess.run(
        ["sh", "-c", line.replace("wandb sync", f"{shlex.quote(str(wandb))} sync --dry-run")],
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    output = asked.stdout + asked.stderr
    assert asked.returncode == 0 and all(folder.name.rpartition("-")[2] in output for folder in folders(save_dir))


def test_the_configuration_is_nested(tmp_path):
    session(tmp_path, 0, 2)
    records = [*records_in(next(folders(tmp_path)[0].glob("*.wandb")))]
    updates = [each for record in records for each in (*record.config.update, *record.run.config.update)]
    assert {"seed": 0, "batch": [1, 2]} in [json.loads(each.value_json) for each in updates if each.key == "train"]


@pytest.mark.slow
def test_a_row_that_a_kill_cut_short_harms_no_other(tmp_path):
    session(tmp_path, 0, 4, kill=4)  # W&B's process got nothing onto the disk
    with open(tmp_path / FILE_NAME, "a") as file:
        file.write('{"step": 6, "val')
    session(tmp_path, 4, 8)
    assert without_times(rows(tmp_path)) == expected(8)
