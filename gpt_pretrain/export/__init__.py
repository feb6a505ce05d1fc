"""Other people's formats and harnesses: a checkpoint's weights as transformers and llm.c read them.

`train/weight_files` knows the formats, as `--from_pretrained` reads them too.
"""
