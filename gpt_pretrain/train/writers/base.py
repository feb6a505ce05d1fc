"""What all writers of a run share."""

import re

from gpt_pretrain.train.writers.clu import MetricWriter

SAMPLE = re.compile(r"samples/([1-9]\d*)")  # the texts that a model makes during training, from 1, one a prompt


def _refuse(kind: str):
    def method(self, *args, **kwargs):
        able = "scalars, texts, histograms and hparams"
        raise NotImplementedError(f"{type(self).__name__} writes {able}, not {kind}.")

    method.__name__ = f"write_{kind}"
    return method


def ignore(self, *args, **kwargs):
    pass


class RunWriter(MetricWriter):
    """Refuses, in words, the kinds of data that pretraining a language model does not produce."""

    write_summaries = _refuse("summaries")
    write_images = _refuse("images")  # trackers write them
    write_videos = _refuse("videos")
    write_audios = _refuse("audios")
