"""Tokenizers for tests of workers: importable by workers of every kind."""

import os
import signal
import time

from data_prep.store.tokenizers import ByteTokenizer


class Slow(ByteTokenizer):
    """A fifth of a second a text."""

    def encode(self, text):
        time.sleep(0.2)
        return super().encode(text)


class Deadly(ByteTokenizer):
    """Kills its process at one text, as a native library can."""

    def encode(self, text):
        if text == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text)
