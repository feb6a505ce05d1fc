"""Our model as a model of lm-evaluation-harness; the only module that imports it at the top.

What it asks is what its own `hf` model would be asked on a folder that `gpt_pretrain.export` writes: the same token
ids, cut on the left at the same place.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]

from gpt_pretrain.tasks.packing import Request
from gpt_pretrain.tasks.task_model import TaskModel

_MOST_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is there counts
_GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}


class HarnessModel(TemplateLM):
    """`TemplateLM` turns texts into ids and pairs; what is here asks the model."""

    def __init__(self, model: TaskModel):
        super().__init__()
        self._model = model
        # In a text, its spelling is the token itself, as in transformers; `Tokenizer.encode` takes it for a text.
        self._end_of_text = model.tokenizer.decode(np.array([model.end_of_text]))

    @property
    def eot_token_id(self) -> int:
        return self._model.end_of_text

    @property
    def max_length(self) -> int:
        return self._model.max_length

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say how many, as of `hf`."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        return self._model.tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids; with end-of-text before them where contexts begin so, unless `add_special_tokens` is False."""
        ids: list[int] = []
        for number, piece in enumerate(string.split(self._end_of_text) if self._end_of_text else [string]):
            ids += [self.eot_token_id] * (number > 0) + self._model.tokenizer.encode(piece).tolist()
        is_context = add_special_tokens is not False and self._model.end_of_text_first
        return list(self._model.context(ids)) if is_context else ids

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        scores = self._model.scores([Request(context, continuation) for _, context, continuation in requests])
        answers = [(score.loglikelihood, score.is_greedy) for score in scores]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        windows, counts = [], []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            found = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            new = [(None, *utils.make_disjoint_window(window)) for window in found]
            windows += new
            counts.append(len(new))
        found = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(found)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            asked = requests[numbers[0]].args[1]
            found = self._generate([requests[number].args[0] for number in numbers], asked)
            for number, text in zip(numbers, found, strict=True):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _generate(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        num_tokens, until, how = _how(asked, self.max_gen_toks)
        if self._end_of_text:
            until = [*until, self._end_of_text]

        def text_of(ids: list[int]) -> str:
            text = self._model.decode(ids)
            for stop in filter(None, until):
                text = text.split(stop)[0]
            return text

        def has_ended(ids: list[int]) -> bool:
            text = self._model.decode(ids)
            return any(stop in text for stop in filter(None, until))

        prompts = [self.tok_encode(context) or [self.eot_token_id] for context in contexts]
        new = self._model.continue_all(prompts, num_tokens=num_tokens, has_ended=has_ended, **how)
        return [text_of(ids) for ids in new]

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
        raise ValueError("a pretrained model has no chat template; expected a task of plain text")


def _how(asked: dict[str, Any], default_num_tokens: int) -> tuple[int, list[str], dict[str, Any]]:
    """A task's `generation_kwargs` -> most new tokens, texts that end one, arguments of `choose_token`.

    Raises ValueError for what we do not have, such as beams.
    """
    left = {name: value for name, value in asked.items() if value is not None}
    most_new = [left.pop(name) for name in _MOST_NEW if name in left]
    until = left.pop("until", [])
    is_sampled = left.pop("do_sample", left.get("temperature", 0.0) > 0.0)
    how = {name: type(default)(left.pop(name, default)) for name, default in _GREEDY.items()}
    if unknown := sorted(left):
        raise ValueError(
            f"generation_kwargs: found {', '.join(unknown)}; expected until, max_gen_toks, do_sample, temperature, "
            "top_k and top_p"
        )
    num_tokens = int(most_new[0]) if most_new else default_num_tokens
    return num_tokens, [until] if isinstance(until, str) else list(until), how if is_sampled else dict(_GREEDY)
