"""What makes the ArrayRecord shards a dataset for TensorFlow Datasets, without TensorFlow."""

from collections.abc import Sequence
from typing import Any

from data_prep.store.manifest import Shard
from data_prep.store.names import DATASET_NAME, TFDS_FILES
from data_prep.store.token_bin import token_dtype


def tfds_metadata(shards: Sequence[Shard], record_tokens: int, vocab_size: int) -> dict[str, Any]:
    """The two JSON files that TFDS needs beside the ArrayRecord shards, by file name; none where there are no such.

    `tfds.builder_from_directory(dir).as_data_source("train")` opens them.
    """
    shards = [shard for shard in shards if shard.format == "array_record"]
    if not shards:
        return {}
    info, features = TFDS_FILES
    core = "tensorflow_datasets.core.features"
    tensor = {
        "pythonClassName": f"{core}.tensor_feature.Tensor",
        "tensor": {
            "dtype": token_dtype(vocab_size).name,
            "encoding": "bytes",
            "shape": {"dimensions": [str(record_tokens)]},
        },
    }
    return {
        info: {
            "fileFormat": "array_record",
            "name": DATASET_NAME,
            "version": "1.0.0",
            "splits": [
                {
                    "name": split,
                    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                    "shardLengths": [str(s.num_rows) for s in shards if s.split == split],
                    "numBytes": str(sum(s.num_bytes for s in shards if s.split == split)),
                }
                for split in sorted({shard.split for shard in shards})
            ],
        },
        features: {
            "pythonClassName": f"{core}.features_dict.FeaturesDict",
            "featuresDict": {"features": {"tokens": tensor}},
        },
    }
