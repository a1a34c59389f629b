"""Our models for lm-eval (the `lm_eval` package): `--model gemmary --model_args model=PATH` in its own command line, started as

    python -m gemmary.evaluate.lm_eval run --model gemmary --model_args model=sample --tasks piqa

lm-eval hands over strings. Every text gets exactly one BOS; a conversation, which lm-eval wants as a string as well, is written
with noncharacters of Unicode in place of structural tokens, so that what a question says can never become one.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gemmary.errors import GemmaryError
from gemmary.evaluate.answering import Prompt, answers
from gemmary.evaluate.kept import Kept, model_digest
from gemmary.gemma import Gemma, load
from gemmary.infer.sampling import Sampling
from gemmary.infer.scoring import Asked, score
from gemmary.text.dialogue import encode_dialogue

__all__ = ["GemmaryLM"]

Progress = Callable[[int, int], None]

_BOS, _START, _END = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKS = re.compile(f"([{_BOS}{_START}{_END}])")
_LOST = "\ufffd"
_CONTEXTS = 64  # whose ids are kept at hand: a question's answers share one, and come together
_WRITE_SECONDS = 2.0  # so much of an evaluation is lost with a kill


@register_model("gemmary")
class GemmaryLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A model that lm-eval asks. `model` is what `gemmary.load` opens, or what it gave.

    `kept` is a file for answers, which are not computed again; `slots` are generated at once, of at most `max_gen_toks` tokens where
    a task does not say. Raises GemmaryError where the model cannot be opened.
    """

    def __init__(
        self,
        model: str | Gemma,
        *,
        dtype: str | None = None,
        hub: bool = False,
        kept: str | Path | None = None,
        slots: int = 8,
        max_gen_toks: int = 256,
        on_progress: Progress | None = None,
        **ignored: Any,  # lm-eval passes batch_size, max_batch_size and device to every model
    ) -> None:
        super().__init__()
        if strange := set(ignored) - {"batch_size", "max_batch_size", "device"}:
            raise GemmaryError(
                f"the model has no argument {min(strange)!r}: model, dtype, hub, kept, slots, max_gen_toks"
            )
        self.gemma = model if isinstance(model, Gemma) else load(model, dtype=dtype, hub=hub)
        self.kept = Kept(Path(kept), model_digest(self.gemma)) if kept is not None else None
        self._slots, self._longest_answer, self.on_progress = slots, max_gen_toks, on_progress
        self._ids = lru_cache(_CONTEXTS)(self._encoded)

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.gemma.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """What begins one."""
        return self.gemma.tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return f"gemma{self.gemma.config.generation}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """For lm-eval's records: which turns are written."""
        return f"gemma{self.gemma.config.generation}" if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a string that `tok_encode` makes into the ids of `text.dialogue`. A system message goes before the first turn."""
        tokenizer = self.gemma.tokenizer
        said = [message | {"content": _MARKS.sub(_LOST, message["content"])} for message in chat_history]
        ids = encode_dialogue(
            tokenizer, said, generation=self.gemma.config.generation, open_turn=add_generation_prompt, system="prefix"
        ).ids
        if not add_generation_prompt:  # the model's turn is not over
            del ids[max(at for at, id in enumerate(ids) if id == tokenizer.end_of_turn) :]
        return self.written(ids)

    def written(self, ids: Sequence[int]) -> str:
        """Ids of a conversation as a string that `tok_encode` makes into them again."""
        tokenizer = self.gemma.tokenizer
        marks = {tokenizer.bos: _BOS, tokenizer.start_of_turn: _START, tokenizer.end_of_turn: _END}
        text, run = "", list[int]()
        for id in ids:
            if id in marks:
                text, run = text + tokenizer.decode(run) + marks[id], []
            else:
                run.append(id)
        return text + tokenizer.decode(run)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A text's ids, BOS before them unless it is there already or not wanted."""
        ids = self._ids(string)
        wanted = add_special_tokens is not False and not (ids and ids[0] == self.prefix_token_id)
        return [self.prefix_token_id, *ids] if wanted else list(ids)

    def _encoded(self, string: str) -> tuple[int, ...]:
        tokenizer = self.gemma.tokenizer
        marks = {_BOS: tokenizer.bos, _START: tokenizer.start_of_turn or 0, _END: tokenizer.end_of_turn or 0}
        ids: list[int] = []
        for part in _MARKS.split(string) if _BOS in string else [_MARKS.sub(_LOST, string)]:
            ids += [marks[part]] if part in marks else tokenizer.encode(part)
        return tuple(ids)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation its log-probability, and whether it is what the model would say."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm or self.on_progress is not None)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found = self._scores([Asked(context, continuation) for _, context, continuation in requests], disable_tqdm)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return found

    def _scores(self, asked: Sequence[Asked], quiet: bool) -> list[tuple[float, bool]]:
        questions = [["score", list(one.context), list(one.continuation)] for one in asked]

        def compute(numbers: list[int], give: Callable[[int, Any], None]) -> None:
            for number, scored in score(self.gemma.engine, [asked[i] for i in numbers]):
                give(numbers[number], list(scored))

        return [(logprob, greedy) for logprob, greedy in self._answered(questions, compute, quiet)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of the model's context where they are longer, each behind one BOS."""
        bos, room = self.prefix_token_id, self.gemma.config.context
        asked, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, bos, max_seq_len=room - 1, context_len=1):
                context, continuation = make_disjoint_window(window)
                asked.append(Asked([bos, *context[context[0] == bos :]], continuation))
                owners.append(owner)
        found = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._scores(asked, disable_tqdm), strict=True):
            found[owner] += logprob
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says to each prompt, up to a task's stop strings or its own stop token. The same prompt several times
        is answered with as many seeds."""
        asked, questions, ends = [], [], []
        times: Counter[str] = Counter()
        for request in requests:
            context, settings = request.args
            key = repr((context, settings))
            one = self._generation(self.tok_encode(context), settings, f"{times[key]} {key}")
            times[key] += 1
            asked.append(one)
            questions.append(["say", list(one.ids), one.most, repr(one.sampling), list(one.stops)])
            ends.append(_END if settings.get("show_end") else "")

        def compute(numbers: list[int], give: Callable[[int, Any], None]) -> None:
            for number, answer in answers(self.gemma, [asked[i] for i in numbers], slots=self._slots):
                give(numbers[number], list(answer))

        said = self._answered(questions, compute, disable_tqdm)
        found = [text + end * itself for (text, itself), end in zip(said, ends, strict=True)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return found

    @staticmethod
    def ended(answer: str) -> tuple[str, bool]:
        """The text of an answer that was asked for with `show_end`, and whether the model ended it itself."""
        return answer.removesuffix(_END), answer.endswith(_END)

    def _generation(self, ids: list[int], settings: dict[str, Any], which: str) -> Prompt:
        """A prompt that fits, and how it is answered; what is drawn depends on `which` it is."""
        until = settings.get("until") or []
        stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
        room = self.gemma.config.context
        most = settings.get("max_gen_toks") or settings.get("max_new_tokens") or settings.get("max_tokens")
        most = min(int(most or self._longest_answer), room // 2)
        if len(ids) > room - most:
            ids = [ids[0], *ids[len(ids) - (room - most) + 1 :]]
        temperature = float(settings.get("temperature") or 0.0)
        if not settings.get("do_sample", temperature > 0):
            return Prompt(ids, most, Sampling(), stops)
        seed = int.from_bytes(hashlib.blake2b(which.encode(), digest_size=4).digest(), "little")
        top_k, top_p = int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0)
        return Prompt(ids, most, Sampling(temperature or 1.0, top_k, top_p, seed=seed), stops)

    def _answered(
        self, questions: list[list[Any]], compute: Callable[[list[int], Callable[[int, Any], None]], None], quiet: bool
    ) -> list[Any]:
        """The answers in the order of the questions: those that are kept, and the rest as `compute` gives them, kept too."""
        keys = [self.kept.key(question) for question in questions] if self.kept else []
        known = self.kept.get(keys) if self.kept else {}
        found: dict[int, Any] = {i: known[key] for i, key in enumerate(keys) if key in known}
        missing = [i for i in range(len(questions)) if i not in found]
        fresh: list[int] = []
        written = time.monotonic()

        def write() -> None:
            nonlocal written
            written = time.monotonic()
            if self.kept:
                self.kept.put((keys[i], found[i]) for i in fresh)
            fresh.clear()

        with tqdm(total=len(questions), initial=len(found), disable=quiet or self.on_progress is not None) as bar:

            def give(number: int, answer: Any) -> None:
                found[number] = answer
                fresh.append(number)
                bar.update()
                if self.on_progress is not None:
                    self.on_progress(len(found), len(questions))
                if time.monotonic() - written > _WRITE_SECONDS:
                    write()

            try:
                compute(missing, give)
            finally:
                write()
        return [found[i] for i in range(len(questions))]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
