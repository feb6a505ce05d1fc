"""What a child process of test_buckets.py does; a module of its own, since a spawned child imports it."""

from data_prep.store import buckets


def copy_in_child(bucket: str) -> None:
    buckets.write(bucket + "/child", buckets.read(bucket + "/parent"), if_version="absent")
