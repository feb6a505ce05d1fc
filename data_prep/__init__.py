"""Offline stage: text in parquet, JSONL or plain files -> a prepared dataset of GPT tokens.

Needs a CPU only and never imports JAX. `python -m data_prep.fineweb --help` is the way in.
"""
