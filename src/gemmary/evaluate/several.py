"""What several answers to one question come to: pass@k of programs, and the answer that most of them give (maj@k)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gemmary.evaluate.code_eval import CodeEval

__all__ = ["majority", "passing"]

_FINAL = re.compile(r"#### *(-?[\d.,]+)")
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def passing(sample: Mapping[str, Any], code: CodeEval) -> dict[str, float]:
    """pass@k for k = 1, 10, 100 and the number of answers, as far as there are so many."""
    programs = sample["filtered_resps"][0]
    if isinstance(programs, str):  # the task looks at the first only
        programs = sample["resps"][0]
    ks = sorted({k for k in (1, 10, 100, len(programs)) if k <= len(programs)})
    return code.compute(references=[sample["target"]], predictions=[programs], k=ks)[0]


def majority(answers: Sequence[str], target: str, *, strict: bool) -> float:
    """1 where the number that most answers end with is the target's, else 0; of equally many the one that came first counts.

    Both are written as GSM8K's are, the number after ####. A strict reader takes only such a number, the other one an answer's last.
    """
    numbers = [number for answer in answers if (number := _said(answer, strict)) is not None]
    return float(bool(numbers) and Counter(numbers).most_common(1)[0][0] == _said(target, True))


def _said(text: str, strict: bool) -> str | None:
    found = (_FINAL if strict else _NUMBER).findall(text)
    return found[0 if strict else -1].replace(",", "").replace("$", "").rstrip(".") if found else None
