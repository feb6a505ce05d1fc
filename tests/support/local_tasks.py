"""Tasks of lm-evaluation-harness with data beside them: multiple choice, one-token choices, rolling, generation."""

import json
import string
from pathlib import Path

import numpy as np

KINDS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{endings}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "letter": """
output_type: multiple_choice
doc_to_text: "{{ctx}}\\nAnswer:"
doc_to_target: "{{label}}"
doc_to_choice: ["A", "B", "C", "D"]
num_fewshot: 2
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "unconditional": """
output_type: loglikelihood
doc_to_text: ""
doc_to_target: "{{endings[0]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "completion": """
output_type: generate_until
doc_to_text: "{{ctx}} "
doc_to_target: "{{endings[label]}}"
generation_kwargs: {until: ["\\n", "ee"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


def write_tasks(folder: Path, *, num_examples: int = 12, most_words: int = 20, seed: int = 0) -> tuple[str, ...]:
    """Writes `local_<kind>.yaml` for each kind, and the data of all; returns the names of the tasks.

    Some texts are longer than a model of 128 positions sees at once; some contexts end in spaces.
    """
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list(string.ascii_lowercase), rng.integers(1, 8))) for _ in range(60)]

    def text(num_words: int) -> str:
        return " ".join(rng.choice(words, max(1, num_words)))

    with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        for index in range(num_examples):
            fields = {
                "ctx": text(rng.integers(1, most_words)) + " " * (index % 3) + "é漢" * (index % 2),
                "endings": [text(rng.integers(1, 6)) for _ in range(4)],
                "label": int(rng.integers(4)),
                "text": text(rng.integers(1, 2 * most_words)),
            }
            file.write(json.dumps(fields) + "\n")
    for kind, body in KINDS.items():
        head = (
            f"task: local_{kind}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{validation: {folder / 'data.jsonl'}}}}}\nvalidation_split: validation\n"
            "fewshot_split: validation\nmetadata: {version: 1}\n"
        )
        (folder / f"local_{kind}.yaml").write_text(head + body.lstrip(), encoding="utf-8")
    return tuple(f"local_{kind}" for kind in KINDS)
