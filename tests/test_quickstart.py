"""What a newcomer does, with the commands that `make train` runs."""

import pathlib
import re
import subprocess
import sys

import pytest
from support.training_runs import environment

REPO = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_the_quickstart_learns_more_than_word_frequencies_and_prints_a_sample(tmp_path):
    commands = [
        ["data_prep.fineweb", "--input=sample", f"--output_dir={tmp_path / 'sample'}"],
        ["data_prep.check", str(tmp_path / "sample")],
        [
            "gpt_pretrain.main",
            "--gin_file=configs/quickstart.gin",
            f"--data_dir={tmp_path / 'sample'}",
            f"--save_dir={tmp_path / 'run'}",
        ],
        ["gpt_pretrain.generate", f"--checkpoint={tmp_path / 'run'}", "--prompt=Enter the King", "--num_tokens=30"],
    ]
    outputs = []
    for command in commands:
        result = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=REPO,
            env=environment() | {"XLA_FLAGS": ""},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=1500,
        )
        assert result.returncode == 0, result.stdout
        outputs.append(result.stdout)
    prepared, checked, trained, generated = outputs
    assert "2,007 documents" in prepared and "OK" in checked
    entropy = float(re.search(r"Unigram entropy of the training data: ([\d.]+) nats", trained)[1])
    losses = [float(loss) for loss in re.findall(r"validation loss ([\d.]+)", trained)]
    first = float(re.search(r"step +1/\d+ \| loss ([\d.]+)", trained)[1])
    assert 10.6 < first < 11.0 and entropy == 6.57
    assert losses[-1] < 6.2 < entropy and losses == sorted(losses, reverse=True)
    assert "--- a sample ---" in trained and "tok/s" in trained and "ETA" in trained
    assert generated.startswith("Enter the King") and len(generated) > 40
