"""Console, TensorBoard and W&B: what a user sees, and what survives a kill or a dead network."""

import http.server
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_pretrain.train.writers import make_writer, metric_writers
from gpt_pretrain.train.writers.console import ConsoleWriter
from gpt_pretrain.train.writers.tensorboard import TensorBoardWriter

GIN = """import my_module

# Parameters for train:
# ==============================================================================
train.batch_size = 512
train.optimizer = @adamw()
train.notes = \\
    'a long one, '
    'in two parts'
"""


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter without stdin; W&B knows nothing but `env`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"HOME": "/nonexistent", "NETRC": "/nonexistent"} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def read_scalars(logdir: os.PathLike[str], name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(os.fspath(logdir)).Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(name)]


# --- CLU without TensorFlow


def test_importing_writers_gives_clu_without_tensorflow_or_wandb(tmp_path):
    done = run_python(
        "import sys; from gpt_pretrain.train.writers import metric_writers, periodic_actions\n"
        f"writer = metric_writers.create_default_writer({str(tmp_path)!r})\n"
        "periodic_actions.ReportProgress(num_train_steps=3, writer=writer)\n"
        "writer.write_scalars(1, {'a': 1.0}); writer.close()\n"
        "print([m for m in ('tensorflow', 'wandb') if m in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr
    assert read_scalars(tmp_path, "a") == [(1, 1.0)]


def test_where_tensorflow_is_installed_clu_keeps_its_own_summary_writer(tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").touch()
    done = run_python(
        "import sys, types\n"
        "hparams = types.ModuleType('hparams'); hparams.api = None  # The real needs TF.\n"
        "sys.modules['tensorboard.plugins.hparams'] = hparams\n"
        "from gpt_pretrain.train.writers import metric_writers\n"
        "print(metric_writers.SummaryWriter.__module__)",
        PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
    )
    assert done.stdout == "clu.metric_writers.tf.summary_writer\n", done.stderr


# --- TensorBoard


def test_tensorboard_reads_back_what_was_written(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write_scalars(3, {"train/loss": 2.5, "train/examples_seen": 7})
    writer.write_texts(3, {"sample": "Once upon"})
    writer.write_histograms(3, {"weights": np.array([0.0, 1.0, 1.0])}, {"weights": 2})
    writer.write_hparams({"lr": 6e-4, "shape": (1, 2)})
    writer.write_images(3, {"picture": np.arange(60, dtype=np.uint8).reshape(4, 5, 3)})
    writer.flush()
    events = EventAccumulator(str(tmp_path)).Reload()  # Before close(): flush() alone must do.
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 2.5)]
    assert events.Tensors("sample/text_summary")[0].tensor_proto.string_val == [b"    Once upon"]
    assert events.Histograms("weights")[0].histogram_value.num == 3
    hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert hparams.plugin_name == "hparams" and b"(1, 2)" in hparams.content
    (image,) = events.Images("picture")
    assert (image.step, image.width, image.height) == (3, 5, 4) and image.encoded_image_string.startswith(b"\x89PNG")
    with pytest.raises(NotImplementedError, match=r"TensorBoardWriter writes scalars.* not videos"):
        writer.write_videos(3, {"x": np.zeros((1, 1, 1, 1, 1))})
    writer.close()


def test_curves_of_a_killed_and_resumed_run_do_not_double_up(tmp_path):
    def train(start_step: int, steps: range, loss: float):
        writer = make_writer(["tensorboard"], save_dir=tmp_path, total_steps=9, start_step=start_step)
        for step in steps:
            writer.write_scalars(step, {"train/loss": loss})
        writer.close()

    def curve():
        return read_scalars(tmp_path / "tensorboard", "train/loss")

    train(0, range(0, 3), 1.0)
    train(0, range(0, 6), 2.0)  # Killed before there was a checkpoint.
    assert curve() == [(step, 2.0) for step in range(6)]
    train(3, range(4, 8), 3.0)
    assert curve() == [(step, 2.0) for step in range(4)] + [(step, 3.0) for step in range(4, 8)]


# --- W&B

TWO_STEPS = """
from gpt_pretrain.train.writers.wandb import WandbWriter
from gpt_pretrain.train.writers import make_writer
WandbWriter.PROBE_TIMEOUT_SECS = 1.0
writer = make_writer(["wandb"], save_dir=SAVE_DIR, total_steps=9, config_text=GIN,
                     settings={"train": {"batch_size": 512}})
for step in (1, 2):
    writer.write_scalars(step, {"train/loss": 3.0})
    writer.write_texts(step, {"sample": "<b>"})
    writer.write_histograms(step, {"weights": [1.0, 2.0]})
writer.close()
"""


def train_with_wandb(save_dir: pathlib.Path, **env: str) -> tuple[str, float]:
    """Returns the one line that two steps print, and the seconds they take."""
    start = time.monotonic()
    done = run_python(f"SAVE_DIR, GIN = {str(save_dir)!r}, {GIN!r}\n{TWO_STEPS}", **env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1, done.stdout
    return done.stdout, time.monotonic() - start


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_wandb_without_a_key_runs_offline_and_a_resumed_run_keeps_its_id(tmp_path):
    save_dir = tmp_path / "run"
    first, _ = train_with_wandb(save_dir)
    assert first.startswith("W&B offline | no API key")
    assert f"wandb sync {save_dir}/wandb/offline-run-" in first
    run_id = (save_dir / "wandb_run_id.txt").read_text()
    second, _ = train_with_wandb(save_dir, WANDB_MODE="offline")
    assert second.startswith("W&B offline | as WANDB_MODE says")
    runs = list(save_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert [run.name for run in runs] == [f"run-{run_id}.wandb"] * 2
    for run in runs:
        assert (run.parent / "files" / "operative_config.gin").read_text() == GIN
    rows = [sorted(runs)[0].read_bytes(), sorted(runs)[1].read_bytes()]
    assert all(name in rows[0] for name in (b"train/loss", b"sample", b"weights", b"batch_size"))
    assert b"batch_size" in rows[1] and b"train/loss" not in rows[1]  # those steps are there already


def test_wandb_goes_offline_when_its_server_does_not_answer(tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    said, secs = train_with_wandb(tmp_path / "run", WANDB_BASE_URL=url, WANDB_API_KEY="a" * 40)
    assert said.startswith(f"W&B offline | no answer from {url}: ") and "wandb sync" in said
    assert secs < 12


def test_wandb_goes_offline_when_its_server_accepts_and_stays_silent(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        said, secs = train_with_wandb(tmp_path / "run", WANDB_BASE_URL=url, WANDB_API_KEY="a" * 40)
    assert said.startswith(f"W&B offline | no answer from {url}: timed out")
    assert secs < 12


class RefuseAll(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format, *args):
        pass


def test_wandb_goes_offline_when_its_server_refuses_the_key(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RefuseAll) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        said, _ = train_with_wandb(tmp_path / "run", WANDB_BASE_URL=url, WANDB_API_KEY="a" * 40)
        server.shutdown()
    assert said.startswith("W&B offline | online failed: ") and "401" in said
    assert list((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))


def test_wandb_mode_disabled_leaves_nothing_behind(tmp_path):
    said, _ = train_with_wandb(tmp_path / "run", WANDB_MODE="disabled")
    assert said == "W&B disabled | as WANDB_MODE says\n"
    assert not list((tmp_path / "run").iterdir())


# --- Console


def test_console_prints_one_aligned_line_per_step(capsys):
    writer = ConsoleWriter(1000, details="TensorBoard in runs/x")
    train = {
        "train/loss": 6.0912,
        "train/accuracy": 0.1124,
        "train/learning_rate": 2.9e-3,
        "train/grad_norm": 0.84,
        "train/param_norm": 99.0,
        "train/update_norm": 0.1,
        "train/tokens_per_sec": 1312.4,
        "train/mfu": 0.412,
        "train/examples_seen": 1920,
        "train/eta_secs": 192.4,
    }
    writer.write_scalars(120, train)
    writer.write_scalars(8, train | {"train/loss": 10.8249, "train/eta_secs": 36_605.0})
    writer.write_scalars(120, {"validation/loss": 6.1234, "validation/accuracy": 0.11})
    writer.write_scalars(120, {f"statistics/block_{i}/rms": 1.0 for i in range(96)})
    writer.write_scalars(120, {"train/loss": 6.0, "train/router_loss": 0.25})
    writer.write_scalars(120, {"steps_per_sec": 2})
    assert capsys.readouterr().out.splitlines() == [
        "step  120/1000 | loss  6.0912 | acc 0.112 | lr 2.9e-03 | grad  0.84 |     1,312 tok/s"
        " | MFU 41.2% |  12% | ETA 0:03:12",
        "step    8/1000 | loss 10.8249 | acc 0.112 | lr 2.9e-03 | grad  0.84 |     1,312 tok/s"
        " | MFU 41.2% |   0% | ETA 10:10:05",
        "step  120/1000 | validation loss 6.1234 | accuracy 0.1100",
        "step  120/1000 | statistics: 96 values, see TensorBoard in runs/x",
        "step  120/1000 | loss  6.0000 | router_loss 0.2500 |  12%",
        "step  120/1000 | steps_per_sec 2.0000",
    ]


# --- make_writer


def test_an_unknown_writer_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"tensorbord.*known are.*'tensorboard'"):
        make_writer(["console", "tensorbord"], save_dir=tmp_path / "run", total_steps=1)
    assert not (tmp_path / "run").exists()


def test_only_the_primary_process_writes(tmp_path, capsys):
    writer = make_writer(save_dir=tmp_path / "run", total_steps=1, is_primary=False)
    writer.write_scalars(1, {"train/loss": 1.0})
    writer.close()
    assert not (tmp_path / "run").exists() and not capsys.readouterr().out


def test_a_failing_writer_is_logged_once_and_the_others_go_on(tmp_path, capsys, caplog, monkeypatch):
    def write_scalars(self, step, scalars):
        raise OSError("No space left on device")

    monkeypatch.setattr(TensorBoardWriter, "write_scalars", write_scalars)
    writer = make_writer(["console", "tensorboard"], save_dir=tmp_path, total_steps=9)
    for step in range(1, 4):
        writer.write_scalars(step, {"train/loss": 1.0})
        writer.flush()
    writer.close()
    assert capsys.readouterr().out.count("loss") == 3
    failures = [r for r in caplog.records if "TensorBoardWriter.write_scalars failed" in r.message]
    assert len(failures) == 1 and "No space left" in caplog.text


def test_nothing_is_reordered_or_lost_at_close(tmp_path):
    writer = make_writer(["tensorboard"], save_dir=tmp_path, total_steps=500, config_text=GIN)
    assert isinstance(writer, metric_writers.MultiWriter)
    for step in range(500):
        writer.write_scalars(step, {"train/loss": step})
    writer.close()
    file = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    assert b"train.batch_size = 512" in file
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(500))
