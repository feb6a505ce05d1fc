"""Packaging. Tested versions of everything below are pinned in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="gpt-pretrain",
    version="0.1.0",
    description="Text in, GPT out, and every batch accounted for: pretraining in JAX with a reproducible data order.",
    python_requires=">=3.11",
    packages=find_packages(include=["data_prep", "data_prep.*", "gpt_pretrain", "gpt_pretrain.*"]),
    package_data={"data_prep": ["assets/*", "pages/*.css", "pages/*.js"]},
    install_requires=[
        "absl-py",
        "aiohttp",  # https:// inputs
        "array_record",
        "awkward",  # what gigatoken takes texts and gives ids in
        "blake3",
        "clu",
        "flax",
        "fsspec",
        "gigatoken",
        "gin-config",
        "grain",
        "huggingface_hub",  # hf:// inputs
        "jax",
        "numpy",
        "optax",
        "orbax-checkpoint",
        "pyarrow",
        "tensorboardX",  # event files without TensorFlow
        "tensorflow-datasets",
        "tiktoken",
        "tqdm",
        "wandb",
        "xxhash",
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "s3": ["s3fs"],
        "gcs": ["gcsfs"],
        "hf": ["tokenizers"],  # --tokenizer=PATH/tokenizer.json
        "view": ["tensorboard"],
        "test": [
            "markdown-it-py",
            "pyright",
            "pytest",
            "pytest-xdist",
            "PyYAML",
            "ruff",
            "tensorboard",
            "tokenizers",
            "zstandard",
        ],
    },
)
