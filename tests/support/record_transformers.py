"""Writes tests/transformers_vectors.json: what transformers computes with the models of `support/weights.py`.

`make test-exchange` compares the file with what transformers says then. To record it again, with tests/ on PYTHONPATH:

    PYTHONPATH=.:tests .venv-exchange/bin/python -m support.record_transformers
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from gpt_pretrain.export import __main__ as export
from support.weights import COLUMNS, PROMPT, RECORDED, SHAPES, ids, params_of, save_checkpoint


def logits_and_greedy(folder) -> tuple[np.ndarray, list[int]]:
    """What transformers says of a folder: logits of `ids()` and the continuation of PROMPT."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        logits = model(torch.tensor(ids())).logits.float().numpy()
        new = model.generate(torch.tensor([PROMPT]), max_new_tokens=10, do_sample=False)[0, len(PROMPT) :]
    return logits, new.tolist()


def main() -> None:
    import torch
    import transformers

    shapes = {}
    for name, spec in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(f"{folder}/run", spec, params_of(spec))
            assert export.main([f"{folder}/run", f"{folder}/out", "--to=hf"]) == 0
            logits, greedy = logits_and_greedy(Path(folder, "out"))
        shapes[name] = {"logits": [[float(x) for x in row] for row in logits[0, :, COLUMNS]], "greedy": greedy}
    how = f"tests/support/record_transformers.py, transformers {transformers.__version__}, torch {torch.__version__}"
    RECORDED.write_text(json.dumps({"recorded_by": how, "shapes": shapes}) + "\n")


if __name__ == "__main__":
    main()
