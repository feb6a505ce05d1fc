"""What the files of a prepared dataset are called."""

from data_prep.store.manifest import DOCUMENTS, INDEX

DATASET_NAME = "fineweb"  # as TFDS knows it, and the front of the names of token files
TFDS_FILES = ("dataset_info.json", "features.json")
PATTERNS = (  # of what only we write
    f"{DATASET_NAME}_*",
    f"{DATASET_NAME}-*",
    f"{DOCUMENTS}_*",
    "blocks-*.b3",
    TFDS_FILES[0],
)


def blocks_name(split: str) -> str:
    """The name of the file of a split's block digests.

    >>> blocks_name("train")
    'blocks-train.b3'
    """
    return f"blocks-{split}.b3"


def shard_name(format: str, split: str, index: int, num_shards: int) -> str:
    """The name of a file; those of ArrayRecord are as TFDS expects them.

    >>> shard_name("bin", "train", 0, 2), shard_name("array_record", "val", 0, 1)
    ('fineweb_train_000000.bin', 'fineweb-val.array_record-00000-of-00001')
    """
    if format == "bin":
        return f"{DATASET_NAME}_{split}_{index:06d}.bin"
    if format == DOCUMENTS:
        return f"{DOCUMENTS}_{split}_{index:06d}.parquet"
    if format == INDEX:
        return f"{DOCUMENTS}_{split}_{index:06d}.index"
    return f"{DATASET_NAME}-{split}.array_record-{index:05d}-of-{num_shards:05d}"
