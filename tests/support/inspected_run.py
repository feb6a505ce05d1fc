"""A run's data.json and ledger.bin without a training run, for `replay` and `inspect`."""

import json
import os

from data_prep import fineweb
from data_prep.store.datasets import open_dataset
from gpt_pretrain.data.batches import Batches
from gpt_pretrain.data.ledger import Ledger
from gpt_pretrain.data.plan import Plan
from gpt_pretrain.data.run import RunData
from gpt_pretrain.data.stages import Stage, Stream

HOSTILE = "<script>alert('é')</script> & \"'`<img src=x onerror=alert(1)> 日本 😀 "


def prepare(directory, *, num_documents=120, text="the cat sat on a mat and purred ", name="doc") -> str:
    """A dataset of byte tokens with ids and urls in several shards; documents of 1 to some hundred tokens."""
    os.makedirs(directory, exist_ok=True)
    lines = [
        {
            "id": f"<{name}-{i}>",
            "url": f"https://example.org/{name}?i={i}&q=<b>",
            "text": (HOSTILE if i % 7 == 3 else "") + text * (1 + i * i % 11) + str(i),
        }
        for i in range(num_documents)
    ]
    path = os.path.join(directory, "text.jsonl")
    with open(path, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    out = os.path.join(directory, "prepared")
    status = fineweb.main(
        [
            f"--input={path}",
            f"--output_dir={out}",
            "--tokenizer=byte",
            "--shard_tokens=5000",
            "--val_tokens=2000",
            "--record_tokens=64",
            "--num_workers=1",
        ]
    )
    assert not status
    return out


def stream(directory, name="", **changes) -> Stream:
    dataset = open_dataset(directory)
    return Stream(name, dataset.fingerprint, dataset.splits["train"].num_tokens, **changes)


def write_run(save_dir, directories: dict[str, str], plan: Plan, *, num_steps=60, num_consumed=40) -> str:
    """What a run of this plan leaves behind after `num_consumed` updates; its save_dir."""
    os.makedirs(save_dir, exist_ok=True)
    RunData(str(save_dir), plan, directories, num_steps).write()
    Ledger(each.digest for each in batches_of(directories, plan, num_consumed)).write(save_dir)
    return str(save_dir)


def batches_of(directories, plan: Plan, num_steps: int):
    """The first batches, by brute force: what the trainer would read."""
    sources = {name: open_dataset(directory).splits["train"] for name, directory in directories.items()}
    batches = Batches(sources, plan, vocab_size=257, num_steps=num_steps)
    return [batches[step] for step in range(num_steps)]


def simple_plan(*streams: Stream, **changes) -> Plan:
    return Plan((Stage(**({"seed": 3, "seq_len": 32, "batch_sizes": ((0, 8),), "streams": streams} | changes)),))
