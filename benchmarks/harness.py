"""lm-evaluation-harness with our model against its own `hf` model, on one export and the same tasks, in turns.

Needs what `make test-exchange` installs. Weights are random: what is compared is log-likelihoods and time.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

TASKS = {
    "endings": """
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{endings}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "letters": """
output_type: multiple_choice
doc_to_text: "{{ctx}}\\nAnswer:"
doc_to_target: "{{label}}"
doc_to_choice: ["A", "B", "C", "D"]
num_fewshot: 3
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
}


def write_tasks(folder: Path, num_examples: int) -> None:
    """English of the embedded sample, in the lengths of HellaSwag: contexts of 20 to 60 words, endings of 5 to 30."""
    import pyarrow.parquet as pq

    from data_prep.store.locations import ASSETS

    words = " ".join(pq.read_table(ASSETS / "sample.parquet")["text"].to_pylist()[:200]).split()
    rng = np.random.default_rng(0)

    def text(least: int, most: int) -> str:
        start = rng.integers(len(words) - most)
        return " ".join(words[start : start + rng.integers(least, most)])

    with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        for _ in range(num_examples):
            endings = [text(5, 30) for _ in range(4)]
            fields = {"ctx": text(20, 60), "endings": endings, "label": int(rng.integers(4)), "text": text(100, 900)}
            file.write(json.dumps(fields) + "\n")
    for name, body in TASKS.items():
        head = f"""task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder / "data.jsonl"}}}}}
validation_split: validation
fewshot_split: validation
"""
        (folder / f"{name}.yaml").write_text(head + body.lstrip(), encoding="utf-8")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python benchmarks/harness.py", description=__doc__)
    parser.add_argument("--num_examples", type=int, default=100)
    parser.add_argument("--n_layer", type=int, default=6)
    parser.add_argument("--n_embd", type=int, default=384)
    parser.add_argument("--batch_sizes", default="1,8,32", help="of the hf model")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tasks", default=",".join(TASKS))
    return parser


def main() -> None:
    args = make_parser().parse_args()
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"

    from gpt_pretrain import runtime

    runtime.configure()
    import jax
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast  # pyright: ignore

    from data_prep.store.byte_pairs import GPT2Tokenizer
    from gpt_pretrain.model.spec import GPTConfig
    from gpt_pretrain.parallel.mesh import make_mesh
    from gpt_pretrain.tasks.harness_model import HarnessModel
    from gpt_pretrain.tasks.task_model import TaskModel
    from gpt_pretrain.train.pretrained import weights_of

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tasks(folder, args.num_examples)
        tokenizer = GPT2Tokenizer()
        (folder / "model").mkdir()
        (folder / "model" / "tokenizer.json").write_text(json.dumps(tokenizer.to_tokenizer_json()))
        ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
        PreTrainedTokenizerFast(tokenizer_file=str(folder / "model" / "tokenizer.json"), **ends).save_pretrained(
            folder / "model"
        )
        n_head = args.n_embd // 64
        GPT2LMHeadModel(
            GPT2Config(n_layer=args.n_layer, n_embd=args.n_embd, n_head=n_head, n_positions=1024)
        ).save_pretrained(folder / "model")
        config = GPTConfig(n_layer=args.n_layer, n_embd=args.n_embd, n_head=n_head)
        spec = config.settle("cpu", seq_len=1024, vocab_size=50257, end_of_text=50256)
        mesh = make_mesh(jax.devices())
        from functools import partial

        from gpt_pretrain.model.gpt import init_params
        from gpt_pretrain.parallel.partition import replicated

        shapes = jax.eval_shape(partial(init_params, spec), jax.random.key(0))
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), shapes
        )
        ours = TaskModel(spec, mesh, tokenizer)
        ours.params = weights_of(str(folder / "model"), spec, abstract)
        models = {"ours": HarnessModel(ours)}
        for size in map(int, args.batch_sizes.split(",")):
            models[f"hf, batches of {size}"] = HFLM(pretrained=str(folder / "model"), device="cpu", batch_size=size)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        for task in args.tasks.split(","):
            secs: dict[str, list[float]] = {name: [] for name in models}  # of the clock
            cpu_secs: dict[str, list[float]] = {
                name: [] for name in models
            }  # of processors: what a busy machine leaves
            answers = {}
            for _turn in range(args.turns + 1):  # the first compiles
                for name, model in models.items():
                    began, cpu_began = time.monotonic(), time.process_time()
                    found = simple_evaluate(model, tasks=[task], task_manager=manager, log_samples=True)
                    secs[name].append(time.monotonic() - began)
                    cpu_secs[name].append(time.process_time() - cpu_began)
                    assert found is not None
                    answers[name] = (
                        {key: value for key, value in found["results"][task].items() if "," in key},
                        [np.ravel([r[0] if isinstance(r, tuple | list) else r for r in sample["filtered_resps"]])
                         for sample in found["samples"][task]],
                    )  # fmt: skip
            for name in models:
                difference = max(
                    float(np.abs(a - b).max()) for a, b in zip(answers["ours"][1], answers[name][1], strict=True)
                )
                ours_secs, again = (statistics.median(secs[each][1:]) for each in ("ours", name))
                ours_cpu, cpu = (statistics.median(cpu_secs[each][1:]) for each in ("ours", name))
                print(
                    f"{task:8}  {name:18}  first {secs[name][0]:6.1f} s, again {again:6.1f} s ({again / ours_secs:.2f} "
                    f"of ours), {cpu:6.1f} s CPU ({cpu / ours_cpu:5.2f} of ours); log-likelihoods differ by "
                    f"{difference:.1e}; {answers[name][0]}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
