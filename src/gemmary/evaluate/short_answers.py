"""Short answers, judged as the data sets' authors do: lm-eval's tasks end an answer at a full stop or a comma, so that no "St. Louis" and no
"10,000" can be right."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["exact", "plain"]

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_MARKS = re.compile(f"[{re.escape(string.punctuation)}‘’´`_]")


def plain(text: str) -> str:
    """Lower case, without articles and marks, words one space apart; as TriviaQA's own evaluation compares answers (Joshi et al. 2017,
    arXiv 1705.03551)."""
    return " ".join(_ARTICLES.sub(" ", _MARKS.sub(" ", text.lower())).split())


def exact(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """For lm-eval: whether an answer is one of the aliases."""
    return {"exact_match": float(plain(results[0]) in {plain(alias) for alias in doc["answer"]["aliases"]})}
