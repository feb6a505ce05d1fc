"""Weights in other people's formats. Each format is written and read in one file.

    names               GPT-2's names of the parameters, which every format is translated to
    tensors             tensors that lie in a file, read and written part by part
    safetensors_file    .safetensors
    llmc_file           llm.c's model file
    transformers_config config.json of transformers
    hub                 hf:// -> a folder on this machine
    opened              any of these -> weights that can be checked and loaded

Weights are data: nothing in here unpickles, imports or calls what a file names.
"""
