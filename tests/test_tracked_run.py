"""Whole runs as processes: their trackers, their records, their last lines."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from jax.profiler import ProfileData
from tensorboard.backend.event_processing import data_provider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from data_prep.store.files import digest_of
from gpt_pretrain.train.provenance import Provenance
from gpt_pretrain.train.writers.tensorboard import HPARAMS_METRICS
from gpt_pretrain.train.writers.wandb_rows import records_in

REPO = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.slow  # each run takes as long as ten other tests


def shell(command: str, **env: str) -> str:
    """Runs a line as a user types it; its output. It must end well."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env = {"JAX_PLATFORMS": "cpu", "WANDB_MODE": "offline", "HOME": "/nonexistent", **env}
    xla_flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1"
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=REPO,
        env=clean | {"XLA_FLAGS": xla_flags} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    )
    output = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, output
    return output


def line_of(output: str, name: str) -> str:
    """What the last lines tell to type, as it stands there, to the line's end."""
    return next(line.split(":", 1)[1].strip() for line in output.splitlines() if line.startswith(f"  {name}:"))


@pytest.fixture(scope="module")
def first(tiny_dataset, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A run of 8 steps that is complete; its save_dir and output. Its output streams are ASCII."""
    save_dir = tmp_path_factory.mktemp("runs") / "it's a run"
    output = shell(
        f"{sys.executable} -m gpt_pretrain.main --data_dir='{tiny_dataset}' --batch_size=4 --seq_len=16 "
        "--num_tokens=512 --model.n_layer=2 --model.n_head=2 --model.n_embd=32 --model.vocab_size=264 "
        "--save_interval=4 --gin_param='train.sample_tokens = 2' --gin_param='train.statistics_interval = 4' --gin_param='train.log_interval = 2' "
        "--gin_param='train.sample_interval = 4' --gin_param='train.profile_step = 5' "
        f"""--gin_param='train.sample_prompt = ("é 日", "b")' --optimizer.lr=0.01 --save_dir="{save_dir}" """,
        PYTHONIOENCODING="ascii",
        JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.getbasetemp() / "cache"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    return save_dir, output


@pytest.fixture(scope="module")
def second(first, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """The same run, trained on as its last line says, with another peak rate."""
    save_dir, output = first
    command = line_of(output, "train on").split("   #")[0] + " --optimizer.lr=0.02"
    return save_dir, shell(
        command,
        JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.getbasetemp() / "cache"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )


def wandb_records(save_dir) -> list:
    files = sorted(pathlib.Path(save_dir).glob("wandb/offline-run-*/*.wandb"))
    return [record for file in files for record in records_in(file)]


def test_a_print_ends_no_run(first):
    save_dir, output = first
    assert "--- a sample ---\n\\xe9 \\u65e5" in output and "Done at step 8 of 8" in output
    assert '"é 日"' in (save_dir / "config.gin").read_text(encoding="utf-8").replace("'", '"')


def test_the_last_lines_work_as_printed(first, second):
    save_dir, output = first
    assert "Done at step 16 of 16" in second[1]
    assert shell(line_of(output, "sample") + " --num_tokens=4")
    printed = line_of(output, "curves").split("   #")[0]
    folder = subprocess.run(["sh", "-c", printed.replace("tensorboard --logdir=", "printf %s ")], capture_output=True)
    assert folder.stdout.decode() == str(save_dir / "tensorboard")


def test_wandb_has_one_row_a_logged_step(second):
    save_dir, _ = second
    steps, rows = [], {}
    for record in wandb_records(save_dir):
        if record.WhichOneof("record_type") == "history":
            row = {each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in record.history.item}
            steps.append(row["_step"])
            rows[row["_step"]] = row
    assert steps == [1, 2, 4, 6, 8, 9, 10, 12, 14, 16]
    assert any(name.startswith("statistics/") for name in rows[12]) and "train/loss" in rows[12]
    assert {"train/loss", "validation/loss", "step"} <= rows[16].keys()
    assert [step for step, row in rows.items() if "samples/path" in row] == [4, 8, 12, 16]
    assert [step for step, row in rows.items() if "statistics/heat_map/path" in row] == [4, 8, 12, 16]
    (table,) = save_dir.glob(f"wandb/offline-run-*/files/{rows[12]['samples/path']}")
    table = json.loads(table.read_text())
    assert table["columns"] == ["step", "prompt", "text"]
    assert [row[:2] for row in table["data"]] == [[12, "é 日"], [12, "b"]] and table["data"][0][2].startswith("é 日")
    (picture,) = save_dir.glob(f"wandb/offline-run-*/files/{rows[12]['statistics/heat_map/path']}")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_wandb_refers_to_the_data_and_to_each_checkpoint_by_their_digests(second, tiny_dataset):
    save_dir, _ = second
    found = {}
    for record in wandb_records(save_dir):
        if record.WhichOneof("record_type") == "artifact" and record.artifact.type != "run_table":
            (entry,) = record.artifact.manifest.contents
            assert not entry.local_path  # nothing is uploaded
            found[entry.ref] = (record.artifact.type, entry.digest, json.loads(record.artifact.metadata))
    fingerprint = json.loads(pathlib.Path(tiny_dataset, "manifest.json").read_text())["fingerprint"]
    kind, digest, metadata = found.pop(pathlib.Path(os.path.realpath(tiny_dataset)).as_uri())
    assert (kind, digest, metadata["fingerprint"]) == ("dataset", fingerprint, fingerprint)
    run_id = json.loads((save_dir / "data.json").read_text())["run_id"]
    for step in (12, 16):  # those that are still there
        checkpoint = save_dir / "checkpoints" / str(step)
        kind, digest, metadata = found[checkpoint.as_uri()]
        assert (kind, digest) == ("model", digest_of(checkpoint / "digests.json"))
        assert (metadata["step"], metadata["run_id"], metadata["digests.json"]) == (step, run_id, digest)
    assert [int(place.rpartition("/")[2]) for place in found] == [4, 8, 12, 16]


def test_tensorboard_has_samples_pictures_and_the_settings_beside_the_last_metrics(second):
    logdir = str(second[0] / "tensorboard")
    events = EventAccumulator(logdir).Reload()
    for name in ("samples/1", "samples/2"):
        texts = events.Tensors(f"{name}/text_summary")
        assert [each.step for each in texts] == [4, 8, 12, 16]
    assert texts[-1].tensor_proto.string_val[0].startswith(b"    b")  # in Markdown: as it is
    pictures = events.Images("statistics/heat_map")
    assert [each.step for each in pictures] == [4, 8, 12, 16]
    assert all(each.encoded_image_string.startswith(b"\x89PNG") and each.width > 500 for each in pictures)
    last = {name: round(events.Scalars(name)[-1].value, 5) for name in HPARAMS_METRICS}
    (session,) = hparams_tab(logdir)
    assert {each.name.tag: round(each.value, 5) for each in session.metric_values} == last
    # TensorBoard keeps those of the first session; the text "settings" has those of each.
    assert session.hparams["optimizer.lr"].number_value == 0.01 and session.hparams["model.n_embd"].number_value == 32


def hparams_tab(logdir: str) -> list:
    """What TensorBoard's own backend gives the HPARAMS tab: a session group a run."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(logdir).Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, logdir)
    context, asked = backend_context.Context(TBContext(data_provider=provider)), RequestContext()
    metadata = context.hparams_metadata(asked, "")
    experiment = context.experiment_from_metadata(asked, "", True, metadata, None)
    request = api_pb2.ListSessionGroupsRequest(slice_size=10, allowed_statuses=[api_pb2.STATUS_UNKNOWN])
    for each in experiment.metric_infos:
        request.col_params.add().metric.CopyFrom(each.name)
    return list(list_session_groups.Handler(asked, context, "", request).run().session_groups)


def test_a_profile_lies_where_tensorboard_and_xprof_look_for_it_and_holds_the_steps(first):
    save_dir, _ = first  # of 8 steps: the profile of steps 6 to 10 ends with the run
    (file,) = save_dir.glob("tensorboard/plugins/profile/*/*.xplane.pb")
    events = [
        event.name for plane in ProfileData.from_file(str(file)).planes for line in plane.lines for event in line.events
    ]
    assert any("train_step" in name for name in events)


def test_trackers_and_the_run_hold_a_nested_configuration_and_the_provenance(second, tiny_dataset):
    save_dir, _ = second
    provenance = Provenance.read(save_dir)
    manifest = json.loads(pathlib.Path(tiny_dataset, "manifest.json").read_text())
    assert provenance.datasets["data"].fingerprint == manifest["fingerprint"]
    assert provenance.datasets["data"].directory == os.path.realpath(tiny_dataset)
    assert (provenance.num_devices, provenance.mesh, provenance.total_steps) == (1, {"data": 1, "fsdp": 1}, 16)
    assert provenance.num_params == 264 * 32 + 16 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32
    assert {"jax", "flax"} <= provenance.versions.keys() and re.fullmatch(r"3\.\d+\.\d+", provenance.python)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True).stdout.strip()
    assert (provenance.code.commit if provenance.code else "") == head
    settings = {}
    for record in wandb_records(save_dir):
        if record.WhichOneof("record_type") == "config":
            settings |= {each.key: json.loads(each.value_json) for each in record.config.update}
    assert settings["provenance"] == provenance.to_json()
    assert settings["train"]["batch_size"] == 4 and settings["data"]["seq_len"] == 16
    assert settings["model"]["n_embd"] == 32 and settings["optimizer"]["lr"] == 0.02
    events = EventAccumulator(str(save_dir / "tensorboard")).Reload()
    text = events.Tensors("settings/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert manifest["fingerprint"] in text and '"n_embd": 32' in text
    hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optimizer.lr" in hparams and b"provenance.num_params" in hparams


def test_changed_settings_are_announced_and_recorded(first, second):
    save_dir, output = second
    assert "Settings that change after step 8:" in output and "Settings that change" not in first[1]
    assert "optimizer.lr: 0.01 until now, 0.02 from here on" in output
    assert output.count("until now") == 2  # and the tokens
    (line,) = (save_dir / "changes.jsonl").read_text().splitlines()
    assert json.loads(line)["changes"] == {
        "optimizer.lr": {"before": 0.01, "after": 0.02},
        "train.num_tokens": {"before": 512, "after": 1024},
    }
