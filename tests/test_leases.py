"""One holder at a time of a directory in a bucket."""

import dataclasses
import os
import subprocess
import sys
import threading
import time

import pytest
from support.fault_proxy import ALWAYS, Fault

from data_prep.store import buckets, leases

TTL_SECS = 1.2
HOLD = """
import sys, time
from data_prep.store import leases
with leases.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setenv(leases.TTL, str(TTL_SECS))


@pytest.fixture
def directory(bucket):
    return f"{bucket}/run"


def lease_url(directory):
    return f"{directory}/.lease"


def of_another_host(directory, **changes):
    """Leaves the lease of a process that no one here can see."""
    holder = dataclasses.replace(leases.Holder.this_process(TTL_SECS), host="far-away", machine="other", **changes)
    buckets.write(lease_url(directory), holder.to_bytes())
    return holder


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "lease"]


def test_a_lease_is_there_while_it_is_held_and_gone_with_its_thread_afterwards(directory):
    with leases.hold(directory) as lease:
        lease.check()
        assert leases.Holder.from_bytes(buckets.read(lease_url(directory))).pid == os.getpid()
        assert threads()
    assert buckets.stat(lease_url(directory)) is None
    assert not threads()


def test_a_lease_is_released_where_the_block_fails(directory):
    with pytest.raises(ZeroDivisionError), leases.hold(directory):
        raise ZeroDivisionError
    assert buckets.stat(lease_url(directory)) is None and not threads()


def test_of_two_contenders_one_gets_it_and_the_other_is_told_who_has_it(directory):
    holding, outcomes, lock = threading.Barrier(2), [], threading.Lock()
    inside, most = [], []

    def contend():
        holding.wait()
        try:
            with leases.hold(directory, say=lambda _: None):
                with lock:
                    inside.append(1)
                    most.append(len(inside))
                time.sleep(2 * TTL_SECS)  # longer than without renewals
                inside.pop()
                outcomes.append("held")
        except leases.InUse as error:
            outcomes.append(str(error))

    contenders = [threading.Thread(target=contend) for _ in range(2)]
    for each in contenders:
        each.start()
    for each in contenders:
        each.join()
    assert max(most) == 1
    assert outcomes[-1] == "held" and len(outcomes) == 2
    assert outcomes[0].startswith(f"{directory}: another run is using it (process {os.getpid()} of ")
    assert "\n" not in outcomes[0]


def test_it_is_said_once_how_long_at_most_it_is_waited_and_a_silent_holder_is_followed_after_that(directory):
    of_another_host(directory)
    said, began = [], time.monotonic()
    with leases.hold(directory, say=said.append) as lease:
        took = time.monotonic() - began
        lease.check()
    assert TTL_SECS <= took < TTL_SECS + 0.8
    assert len(said) == 1 and "far-away" in said[0] and f"at most {TTL_SECS:g} s" in said[0]


def test_a_holder_that_renews_is_never_followed_whatever_its_clock_says(directory):
    ends = threading.Event()

    def renew():
        renewals = 0
        while not ends.is_set():
            of_another_host(directory, num_renewals=renewals, since="1970-01-01 00:00:00 UTC")
            renewals += 1
            ends.wait(TTL_SECS / 4)

    of_another_host(directory)
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(leases.InUse, match=r"of far-away, since 1970"), leases.hold(directory):
            pass
    finally:
        ends.set()
        thread.join()


def test_a_process_of_this_machine_that_was_killed_is_not_waited_for(directory):
    process = subprocess.Popen([sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    process.kill()  # and not reaped: it is a zombie
    while not leases.Holder.from_bytes(buckets.read(lease_url(directory))).is_dead:
        time.sleep(0.01)
    for _ in range(2):
        holder, began = buckets.read(lease_url(directory)), time.monotonic()
        with leases.hold(directory, say=pytest.fail):
            assert time.monotonic() - began < 0.9 * TTL_SECS
        process.wait()
        buckets.write(lease_url(directory), holder)


def test_a_living_process_of_this_machine_is_not_followed(directory):
    process = subprocess.Popen([sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(leases.InUse, match=f"process {process.pid} of"), leases.hold(directory):
            pass
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1}', b"\xff" * 100_000])
def test_what_no_holder_wrote_is_followed_after_the_time(directory, content):
    buckets.write(lease_url(directory), content)
    said = []
    with leases.hold(directory, say=said.append):
        pass
    assert "somebody" in said[0]


def test_a_lease_of_another_ttl_is_waited_for_as_long_as_it_says(directory, monkeypatch):
    of_another_host(directory)
    monkeypatch.setenv(leases.TTL, "0.1")
    began = time.monotonic()
    with leases.hold(directory):
        assert time.monotonic() - began >= TTL_SECS


def test_renewals_go_on_and_each_is_another_version(directory):
    with leases.hold(directory) as lease:
        versions = set()
        deadline = time.monotonic() + 3 * TTL_SECS
        while len(versions) < 4 and time.monotonic() < deadline:
            versions.add(buckets.stat(lease_url(directory)).version)
            time.sleep(TTL_SECS / 20)
        assert len(versions) == 4
        lease.check()


def test_a_bucket_that_does_not_answer_keeps_nobody_at_the_end(directory, bucket_server, monkeypatch):
    monkeypatch.setattr(leases, "RELEASE_SECS", 0.2)
    monkeypatch.setenv("GPT_PRETRAIN_BUCKET_PATIENCE_SECS", "2.5")
    with leases.hold(directory):
        bucket_server.fail(Fault("silent", secs=2.5, having="run", times=ALWAYS))
        began = time.monotonic()
    assert time.monotonic() - began < 2
    bucket_server.proxy.faults.clear()
    for thread in [each for each in threading.enumerate() if each.name == "lease-release"]:
        thread.join(20)


@pytest.mark.parametrize("how", ["taken", "removed"])
def test_a_lost_lease_is_said_before_a_commit_and_not_removed(directory, how):
    with leases.hold(directory) as lease:
        if how == "taken":
            of_another_host(directory)
        else:
            buckets.remove(lease_url(directory))
        lease._renewed -= TTL_SECS / 2  # as if it was suspended
        with pytest.raises(leases.LeaseLost, match="far-away" if how == "taken" else "removed"):
            lease.check()
        with pytest.raises(leases.LeaseLost):
            lease.check_known()
    assert (buckets.stat(lease_url(directory)) is not None) == (how == "taken")


def test_the_thread_finds_out_about_a_lost_lease_by_itself(directory):
    with leases.hold(directory) as lease:
        of_another_host(directory)
        deadline = time.monotonic() + 2 * TTL_SECS
        with pytest.raises(leases.LeaseLost):
            while time.monotonic() < deadline:
                lease.check_known()
                time.sleep(0.02)


@pytest.mark.parametrize("kind", ["status", "reset", "lost", "truncated"])
def test_trouble_of_the_network_costs_no_lease(directory, bucket_server, kind):
    with leases.hold(directory) as lease:
        bucket_server.fail(*(Fault(kind, having=".lease", times=1, skip=skip) for skip in (0, 0, 1)))
        before, deadline = lease.num_renewals, time.monotonic() + 4 * TTL_SECS
        while lease.num_renewals < before + 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert lease.num_renewals >= before + 4
        lease._renewed -= TTL_SECS
        lease.check()
    assert buckets.stat(lease_url(directory)) is None


def test_a_bucket_that_is_away_for_longer_than_the_ttl_is_an_error_to_retry_and_no_loss(
    directory,
    bucket_server,
    monkeypatch,
    caplog,
):
    monkeypatch.setenv("GPT_PRETRAIN_BUCKET_PATIENCE_SECS", "0.3")
    with leases.hold(directory) as lease:
        bucket_server.fail(Fault("status", having="run", times=ALWAYS))
        time.sleep(1.5 * TTL_SECS)
        with pytest.raises(buckets.BucketError) as failed:
            lease.check()
        assert not isinstance(failed.value, leases.LeaseLost)
        bucket_server.proxy.faults.clear()
        lease.check()
    messages = [record.message for record in caplog.records if "cannot be renewed" in record.message]
    assert len(messages) == 1


def test_a_system_without_the_clock_of_linux_can_hold_a_lease(bucket, monkeypatch):
    monkeypatch.delattr(leases.time, "CLOCK_BOOTTIME")
    with leases.hold(f"{bucket}/run") as lease:
        lease.check()
