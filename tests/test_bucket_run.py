"""A run whose save_dir is in a bucket: killed anywhere, on a machine whose disk is lost, it is the run that nobody
disturbed."""

import dataclasses
import logging
import os
import random
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support.fault_proxy import ALWAYS, Fault
from support.recorded_run import recording
from support.shared import made_once
from support.training_runs import assert_bitwise_equal, final_state, finish, flags, start, start_two, train_here

from data_prep.store import buckets, leases
from gpt_pretrain import generate, inspect, replay, report
from gpt_pretrain.data.ledger import MAGIC, Ledger
from gpt_pretrain.mirrors import Mirror
from gpt_pretrain.train import uploads
from gpt_pretrain.train.actions import checkpointing
from gpt_pretrain.train.exclusive import HeldDirectory

NUM_STEPS = 8
TTL_SECS = 2.0


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache, where mirrors lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(leases.TTL, str(TTL_SECS))
    return tmp_path / "cache" / "gpt_pretrain"


@pytest.fixture(scope="session")
def undisturbed(tiny_dataset, tmp_path_factory) -> Path:
    """A run on this machine's disk."""
    directory = made_once(
        tmp_path_factory,
        "undisturbed-by-buckets",
        lambda directory: train_here(run_flags(tiny_dataset, directory / "run")),
    )
    return directory / "run"


def in_one_store(store):
    """For what no store does otherwise: the other one is slow."""
    other = {"gs": "s3", "s3": "gs"}[store]
    stores = [store, pytest.param(other, marks=pytest.mark.slow)]
    return pytest.mark.parametrize("bucket_server", stores, indirect=True)


def run_flags(dataset, save_dir, **changes):
    changes = {"train.save_interval": 4, "train.writers": ("console", "tensorboard")} | changes
    return flags(dataset, save_dir, num_steps=NUM_STEPS, **changes)


def names_in(url) -> set[str]:
    return {each.url[len(url) + 1 :] for each in buckets.list_objects(url)}


def committed(url) -> list[int]:
    return sorted(int(name.split("/")[1]) for name in names_in(url) if name.endswith("/digests.json"))


def downloaded(url, directory) -> Path:
    for each in buckets.list_objects(url):
        target = directory / each.url[len(url) + 1 :]
        target.parent.mkdir(parents=True, exist_ok=True)
        buckets.download(each.url, target)
    return directory


def assert_is_the_undisturbed_run(url, directory, undisturbed):
    run = downloaded(url, directory)
    assert Ledger.read(run).to_text() == Ledger.read(undisturbed).to_text()
    step, arrays = final_state(run)
    assert step == NUM_STEPS
    assert_bitwise_equal(arrays, final_state(undisturbed)[1])
    assert not [name for name in names_in(url) if name.endswith(".lease")]


def wait_until(condition, secs=60.0):
    deadline = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def written(server) -> list[tuple[str, str]]:
    """("PUT" or "DELETE", name below the run) of what was asked of the store, in order."""
    found = []
    for request in server.proxy.seen:
        path = request.query.get("name", request.path.partition("?")[0]).replace("%2F", "/")
        if request.method in ("PUT", "POST", "DELETE") and "/run/" in f"/{path}":
            found.append(("DELETE" if request.method == "DELETE" else "PUT", f"/{path}".rpartition("/run/")[2]))
    return found


def test_a_run_leaves_in_its_bucket_what_it_would_leave_on_a_disk_and_it_can_be_read_there(
    bucket, bucket_server, tiny_dataset, tmp_path, undisturbed, cache, capsys
):
    url = f"{bucket}/a/run"
    output = train_here(run_flags(tiny_dataset, url))
    assert f"checkpoints: {url}/checkpoints " in output and f"--checkpoint={url} " in output
    assert str(cache) not in output
    assert committed(url) == [4, 8]
    assert_is_the_undisturbed_run(url, tmp_path / "got", undisturbed)

    def names(files):  # but for those that chance names
        return {re.sub(r"(state/.*d/|tensorboard/).*", r"\1", name) for name in files}

    local = [str(path.relative_to(undisturbed)) for path in undisturbed.rglob("*") if path.is_file()]
    assert names(names_in(url)) == names(local) - {".lock"}

    shutil.rmtree(cache)
    bucket_server.proxy.seen.clear()
    commands = [
        (replay, [url, "--verify", "--num_workers=1"], f"{url}: updates 1 to 8 are as the ledger says"),
        (inspect, [url, "--step=3", "--rows=0"], f"{url}: update 3 of 8, consumed"),
        (report, [url, f"--html={tmp_path / 'page.html'}"], f"{tmp_path / 'page.html'}: 1 run, "),
        (generate, [f"--checkpoint={url}", "--num_tokens=2"], ""),
    ]
    for command, arguments, expected in commands:
        assert command.main(arguments) == 0, capsys.readouterr()
        assert expected in capsys.readouterr().out
        copies = [path.name for path in cache.glob("read/*/checkpoints/*")]
        assert copies == (["8"] if command is generate else [])  # no checkpoint where none is needed
    assert not [each for each in bucket_server.proxy.seen if each.method not in ("GET", "HEAD")]
    page = (tmp_path / "page.html").read_text()
    assert f"python -m gpt_pretrain.inspect {url} --step 1<" in page and "Loss, nats a token" in page
    assert str(cache) not in page
    assert replay.main([url, "--against", str(undisturbed)]) == 0


@pytest.mark.slow
def test_killed_while_it_uploads_on_a_disk_that_is_lost_it_goes_on_as_if_nothing_had_happened(
    bucket, bucket_server, tiny_dataset, tmp_path, undisturbed, cache
):
    url = f"{bucket}/run"
    arguments = [*run_flags(tiny_dataset, url), "--per_device_batch_size=1"]
    # The last file of the second checkpoint is never answered: all else of it is there.
    seals = (f"checkpoints{slash}8{slash}digests.json" for slash in ("/", "%2F"))
    bucket_server.fail(*(Fault("silent", secs=60, having=each, times=ALWAYS) for each in seals))
    # No faster than it uploads: step 4 is there before step 8.
    process = start(arguments, num_devices=4, consumed=tmp_path / "consumed", secs_per_step=0.4)
    wait_until(lambda: process.poll() is not None or ("PUT", "checkpoints/8/digests.json") in written(bucket_server))
    process.kill()
    assert process.wait() == -9, process.stdout.read()
    bucket_server.proxy.faults.clear()
    assert committed(url) == [4] and "checkpoints/8/run/metadata" in names_in(url)
    shutil.rmtree(cache)
    output = train_here(arguments)
    assert f"Continuing {url} from step 4 of {NUM_STEPS}" in output
    assert_is_the_undisturbed_run(url, tmp_path / "got", undisturbed)


@pytest.mark.slow
@in_one_store("s3")
def test_the_bucket_can_be_resumed_from_at_any_moment(bucket, bucket_server, tiny_dataset, cache):
    url = f"{bucket}/run"
    train_here(run_flags(tiny_dataset, url, **{"train.save_interval": 3}))
    asked = written(bucket_server)
    lengths = [  # of the ledger, in steps, each time
        (len(each.body.partition(MAGIC)[2].partition(b"\r\n--")[0])) // 8
        for each in bucket_server.proxy.seen
        if each.method in ("PUT", "POST") and MAGIC in each.body
    ]
    seals = [name for what, name in asked if what == "PUT" and name.endswith("digests.json")]
    assert "checkpoints/8/digests.json" in seals
    for seal in seals:
        at, folder = asked.index(("PUT", seal)), seal.removesuffix("digests.json")
        mine = [i for i, (what, name) in enumerate(asked) if what == "PUT" and name.startswith(folder)]
        assert max(mine) == at and len(mine) > 5
        before = [name for what, name in asked[: min(mine)] if what == "PUT"]
        assert any(name.startswith("tensorboard/") for name in before)
        assert lengths[before.count("ledger.bin") - 1] >= int(folder.split("/")[1])
    removed = [(i, name) for i, (what, name) in enumerate(asked) if what == "DELETE" and name.startswith("checkpoints")]
    for step in {name.split("/")[1] for _, name in removed}:
        first = next((i, name) for i, name in removed if name.split("/")[1] == step)
        assert first[1] == f"checkpoints/{step}/digests.json"
        newer = [asked.index(("PUT", seal)) for seal in seals if int(seal.split("/")[1]) > int(step)]
        assert len([at for at in newer if at < first[0]]) >= 2
    # The ledger before what says how far it goes.
    ledgers = [name for what, name in asked if what == "PUT" and name in ("ledger.bin", "data.json")]
    assert ledgers[:2] in (["ledger.bin", "data.json"], ["data.json", "ledger.bin"])
    assert ledgers[2:] == ["ledger.bin", "data.json"] * (len(ledgers) // 2 - 1)


@in_one_store("gs")
def test_what_leads_up_to_a_checkpoint_is_in_the_bucket_before_it(bucket, bucket_server, tmp_path, undisturbed):
    url, directory = f"{bucket}/run", shutil.copytree(undisturbed, tmp_path / "mirror")
    with leases.hold(url) as lease:
        held = HeldDirectory(directory, None)
        uploads.Uploads(Mirror(url, directory), held, lease, 2, set(), set()).close()
    asked = [name for what, name in written(bucket_server) if what == "PUT" and name != ".lease"]
    files = asked[: next(i for i, name in enumerate(asked) if name.startswith("checkpoints/"))]
    assert {"ledger.bin", "data.json", "evaluation.json", "time_ledger.json"} <= set(files)
    assert any(name.startswith("tensorboard/") for name in files)
    assert files.index("ledger.bin") + 1 == files.index("data.json")
    newest = asked.index("checkpoints/8/digests.json")
    assert newest < min(i for i, name in enumerate(asked) if name.startswith("checkpoints/4/"))  # counts first
    assert committed(url) == [4, 8]


@in_one_store("gs")
@pytest.mark.slow
def test_what_is_on_the_disk_already_is_not_fetched_and_what_the_bucket_lacks_is_dropped(
    bucket, bucket_server, tiny_dataset, cache
):
    url = f"{bucket}/run"
    train_here(run_flags(tiny_dataset, url))
    bucket_server.proxy.seen.clear()
    assert f"Continuing {url} from step 8" in train_here(run_flags(tiny_dataset, url))
    gets = [each.path for each in bucket_server.proxy.seen if each.method == "GET" and "checkpoints" in each.path]
    assert not [path for path in gets if "alt=media" in path or ("prefix" not in path and "checkpoints/" in path)]
    # Somebody goes back to step 4, by hand.
    buckets.remove_all(f"{url}/checkpoints/8")
    output = train_here(run_flags(tiny_dataset, url))
    assert f"Continuing {url} from step 4" in output and committed(url) == [4, 8]


@in_one_store("s3")
@pytest.mark.slow
def test_a_damaged_checkpoint_of_the_bucket_is_passed_over_and_a_dead_runs_lease_waited_for(
    bucket, tiny_dataset, tmp_path, undisturbed, cache
):
    url = f"{bucket}/run"
    train_here(run_flags(tiny_dataset, url))
    damaged = max(name for name in names_in(url) if re.fullmatch(r"checkpoints/8/state/.*d/.*", name))
    buckets.write(f"{url}/{damaged}", b"x" * buckets.stat(f"{url}/{damaged}").num_bytes)
    dead = dataclasses.replace(leases.Holder.this_process(TTL_SECS), host="far-away", machine="another")
    buckets.write(f"{url}/.lease", dead.to_bytes())
    shutil.rmtree(cache)
    output = train_here(run_flags(tiny_dataset, url))
    assert f"waiting for at most {TTL_SECS:g} s" in output
    assert re.search(rf"Checkpoint {url}/checkpoints/8 cannot be trusted: .* has digest", output), output
    assert f"Continuing {url} from step 4" in output
    assert b"checkpoint passed over: " in buckets.read(f"{url}/events.jsonl")
    assert_is_the_undisturbed_run(url, tmp_path / "got", undisturbed)
    assert committed(url) == [4, 8] and not [name for name in names_in(url) if name.endswith(".damaged")]


@in_one_store("gs")
def test_a_second_run_is_kept_out(bucket, tiny_dataset, cache):
    with leases.hold(f"{bucket}/run"):
        output = train_here(run_flags(tiny_dataset, f"{bucket}/run"), expect=1)
    assert f"error: {bucket}/run: another run is using it (process {os.getpid()} of " in output
    assert names_in(f"{bucket}/run") == set()


@in_one_store("gs")
@pytest.mark.slow
def test_uploads_that_fail_for_a_while_stop_nothing(
    bucket, bucket_server, tiny_dataset, tmp_path, undisturbed, monkeypatch
):
    url = f"{bucket}/run"

    class Mended(logging.Handler):
        def emit(self, record):
            if "FAILED" in record.getMessage():
                bucket_server.proxy.faults.clear()

    bucket_server.fail(*(Fault("status", having=f"checkpoints{slash}4", times=ALWAYS) for slash in ("/", "%2F")))
    uploads.log.addHandler(mended := Mended())
    try:
        with recording(tmp_path / "consumed", 0.2):
            output = train_here(run_flags(tiny_dataset, url))
    finally:
        uploads.log.removeHandler(mended)
    found = re.findall(
        rf"UPLOADING to {url} FAILED: .*503.*Training goes on; .* newest checkpoint there is none", output
    )
    assert len(found) == 1 and f"UPLOADING to {url} works again" in output, output
    assert_is_the_undisturbed_run(url, tmp_path / "got", undisturbed)


@in_one_store("s3")
@pytest.mark.slow
def test_uploads_that_fail_for_ever_end_the_run_with_an_error_and_the_same_command_makes_up_for_it(
    bucket, bucket_server, tiny_dataset, tmp_path, undisturbed, cache, monkeypatch
):
    monkeypatch.setenv("GPT_PRETRAIN_BUCKET_PATIENCE_SECS", "0.6")
    url = f"{bucket}/run"
    bucket_server.fail(*(Fault("status", having=f"checkpoints{slash}", times=ALWAYS) for slash in ("/8", "%2F8")))
    output = train_here(run_flags(tiny_dataset, url), expect=1)
    mirror = next(cache.glob("runs/run-*"))
    there = f"that of step {committed(url)[0]}" if committed(url) else "none"
    assert (
        f"error: What the run has written is not all in {url}: the newest checkpoint there is {there}, here in "
        f"{mirror} it is that of step 8. Mend the bucket" in output
    ), output
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in output and "Done at step" not in output
    bucket_server.proxy.faults.clear()
    output = train_here(run_flags(tiny_dataset, url))
    assert f"Continuing {url} from step 8" in output
    assert_is_the_undisturbed_run(url, tmp_path / "got", undisturbed)


@in_one_store("gs")
@pytest.mark.slow
def test_a_checkpoint_that_is_removed_here_while_it_is_uploaded_arrives(bucket, bucket_server, tiny_dataset, tmp_path):
    url = f"{bucket}/run"
    # Slower than the thread looks for checkpoints, so that each is uploaded; and while that of step 2 stalls, as many
    # newer ones are saved as are kept.
    stalls = (f"checkpoints{slash}2{slash}run{slash}metadata" for slash in ("/", "%2F"))
    bucket_server.fail(*(Fault("silent", secs=4.0, having=each) for each in stalls))
    os.environ["GPT_PRETRAIN_BUCKET_PATIENCE_SECS"] = "15"  # the fixture sets it back
    with recording(tmp_path / "consumed", 1.0):
        output = train_here(run_flags(tiny_dataset, url, **{"train.save_interval": 1}))
    assert f"Uploaded {url}/checkpoints/2 (" in output, output
    assert committed(url) == [7, 8]


@in_one_store("gs")
def test_a_signal_saves_and_uploads(bucket, tiny_dataset, tmp_path, cache):
    url, consumed = f"{bucket}/run", tmp_path / "consumed"
    consumed.touch()

    def send():
        while len(consumed.read_text().splitlines()) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    with recording(consumed, 0.1):
        output = train_here(run_flags(tiny_dataset, url, **{"train.save_interval": 0}), expect=143)
    stopped = int(re.search(r"Stopped and saved at step (\d+) of 8", output)[1])
    assert committed(url) == [stopped] and stopped < NUM_STEPS


@pytest.mark.slow
@in_one_store("s3")
def test_a_run_whose_lease_is_lost_stops_in_a_line_and_writes_nothing_more(bucket, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "_LOOK_SECS", 0.0)
    monkeypatch.setenv(leases.TTL, "1")
    url, consumed = f"{bucket}/run", tmp_path / "consumed"
    consumed.touch()

    def take():
        while len(consumed.read_text().splitlines()) < 2:
            time.sleep(0.01)
        other = dataclasses.replace(leases.Holder.this_process(60.0), host="far-away", machine="another")
        buckets.write(f"{url}/.lease", other.to_bytes())

    threading.Thread(target=take, daemon=True).start()
    with recording(consumed, 0.3):
        output = train_here(run_flags(tiny_dataset, url, **{"train.save_interval": 0}), expect=1)
    assert re.search(rf"error: {url}: is now held by process \d+ of far-away, since .* Stopped;", output), output
    assert f"step {NUM_STEPS}/{NUM_STEPS}" not in output  # not at the end only
    assert not committed(url) and buckets.stat(f"{url}/.lease")


@pytest.mark.slow
def test_the_weights_of_a_run_in_a_bucket_begin_another_one(bucket, tiny_dataset, tmp_path):
    url = f"{bucket}/run"
    train_here(run_flags(tiny_dataset, url))
    for source, expected in ((url, 8), (f"{url}/checkpoints", 8), (f"{url}/checkpoints/4", 4)):
        arguments = run_flags(tiny_dataset, tmp_path / f"other{expected}", **{"train.from_pretrained": repr(source)})
        assert f"Weights from {url}/checkpoints/{expected};" in train_here(arguments)
        shutil.rmtree(tmp_path / f"other{expected}")


@pytest.mark.parametrize(
    "save_dir, changes, message",
    [
        ("{bucket}-missing/run", {}, r"error: {bucket}-missing/run: there is no bucket"),
        ("{bucket}/a//b", {}, r"error: {bucket}/a//b: has an empty part"),
        (
            "{tmp}/run",
            {"train.from_pretrained": "'{bucket}-missing/run'"},
            r"error: {bucket}-missing/run/checkpoints: there is no",
        ),
        (
            "{tmp}/run",
            {"train.work_dir": "'w'"},
            r"error: .*train\.work_dir: found w, expected None, as train\.save_dir",
        ),
        (
            "http://host/run",
            {},
            r"error: .*train\.save_dir: http://host/run is a URL; expected a directory of this machine,",
        ),
    ],
)
@in_one_store("gs")
def test_a_place_that_cannot_be_used_is_an_error_before_any_work(
    bucket, tiny_dataset, tmp_path, save_dir, changes, message
):
    where = {"bucket": bucket, "tmp": tmp_path}
    changes = {name: text.format(**where) for name, text in changes.items()}
    output = train_here(run_flags(tiny_dataset, save_dir.format(**where), **changes), expect=1)
    assert re.search(message.replace("{bucket}", bucket), output), output
    assert len(output.strip().splitlines()) == 1


@in_one_store("gs")
def test_a_working_directory_that_holds_something_else_is_not_touched(bucket, tiny_dataset, tmp_path, undisturbed):
    other = shutil.copytree(undisturbed, tmp_path / "other")
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*.json")}
    arguments = run_flags(tiny_dataset, f"{bucket}/run", **{"train.work_dir": repr(str(other))})
    output = train_here(arguments, expect=1)
    assert f"error: {other}: holds " in output and f"which is not of {bucket}/run" in output
    assert before == {path: path.stat().st_mtime_ns for path in other.rglob("*.json")}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_with_and_without_its_disk(bucket, tiny_dataset, tmp_path, undisturbed, cache, seed):
    url, rng = f"{bucket}/run", random.Random(f"{bucket[:2]} {seed}")
    arguments = [*run_flags(tiny_dataset, url, **{"train.save_interval": 1}), "--per_device_batch_size=1"]
    for _ in range(4):
        process = start(arguments, consumed=tmp_path / "consumed", secs_per_step=0.3, num_devices=4)
        for line in process.stdout:
            if line.startswith("step"):
                break
        time.sleep(rng.random() * 1.5)
        process.kill()
        process.wait()
        steps = committed(url)
        if rng.random() < 0.5:
            shutil.rmtree(cache)
        assert replay.main([url, "--verify", "--num_workers=1"]) == 0 or not steps
    train_here(arguments)
    assert_is_the_undisturbed_run(url, tmp_path / "got", undisturbed)


TOGETHER = {"mesh.fsdp": 2, "train.per_device_batch_size": 1}


@pytest.mark.slow
def test_a_run_of_one_process_is_continued_by_two_and_by_one_again(bucket, tiny_dataset, tmp_path, cache):
    url = f"{bucket}/run"
    arguments = run_flags(tiny_dataset, url, **{"train.save_interval": 2}, **TOGETHER)
    local = run_flags(tiny_dataset, tmp_path / "local", **{"train.save_interval": 2}, **TOGETHER)
    train_here(local)
    process = start(arguments, consumed=tmp_path / "consumed_alone", secs_per_step=0.3, num_devices=4)
    wait_until(lambda: committed(url))
    process.kill()
    process.wait()
    shutil.rmtree(cache)
    first = committed(url)[-1]
    processes = start_two(arguments, tmp_path, secs_per_step=0.4)
    wait_until(lambda: committed(url)[-1] > first)
    for each in processes:
        each.kill()
    output = "".join(each.communicate()[0] for each in processes)
    assert f"Continuing {url} from step {first}" in output and "2 process(es)" in output
    shutil.rmtree(cache)
    train_here(arguments)
    run = downloaded(url, tmp_path / "got")
    assert Ledger.read(run).to_text() == Ledger.read(tmp_path / "local").to_text()
    for name, array in final_state(run)[1].items():  # other reductions
        np.testing.assert_allclose(array, final_state(tmp_path / "local")[1][name], rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.slow
@in_one_store("gs")
def test_processes_that_do_not_share_a_disk_are_told_what_to_do(bucket, tiny_dataset, tmp_path, cache, monkeypatch):
    url = f"{bucket}/run"
    started = []

    def with_cache_of_its_own(number, arguments):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"host{number}"))
        return start(arguments, num_devices=2)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for number in range(2):
        arguments = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2", f"--process_id={number}"]
        started.append(with_cache_of_its_own(number, [*run_flags(tiny_dataset, url, **TOGETHER), *arguments]))
    outputs = [finish(each, expect=1) for each in started]
    assert "is not the same one for process 1 as for process 0. Set train.work_dir to a directory" in outputs[0]
    assert names_in(url) == set()
