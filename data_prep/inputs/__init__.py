"""Input of any kind (parquet, JSONL, text, TFDS, URLs) -> units -> batches of documents."""
