"""Which language a text is in, offline: its script, and for Latin script the share of each language's function words.

A help for keeping one language and dropping the others, not a general identifier: it knows ten languages in Latin script
and ten scripts, calls all Cyrillic "ru", and says None where no language's words make up an eighth of the text (lists,
code, languages it does not know). What it is worth is measured in `benchmarks/curation.py`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from gemmary.data.words import Hashes, Words

__all__ = ["LANGUAGES", "language"]

_FUNCTION_WORDS = {
    "en": "the of and to a in is that it was for on as with he be by at this have from or an they which you had not are but"
    " his her she we were their been has will would there what if can all who one when your i my so do me no him its",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er hat dass"
    " sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber vor zur bis ich wir",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont avec son il aux ou"
    " mais cette nous vous je on leur été être elle ses ont comme fait d'un d'une c'est qu'il n'est l'on",
    "es": "de la que el en y a los se del las un por con no una su para es al lo como más o pero sus le ha me si sin sobre"
    " este ya entre cuando todo esta ser son dos también fue había era muy años hasta desde está mi porque qué",
    "it": "di e il la che in a per un è del le si una i con non da dei al sono lo della come più nel gli alla ha delle anche"
    " dal o ma nella su questo se degli dalla essere stato ai era suo loro c'è io tra mi ci",
    "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi ao ele das tem à seu sua ou"
    " ser quando muito há nos já está eu também só pelo pela até isso ela entre era depois sem mesmo aos",
    "nl": "de het een en van ik te dat die in is niet op aan met als voor er maar om hem dan zou of wat mijn men dit zo door"
    " over ze zich bij ook tot je mij uit der daar haar naar heb hoe heeft hebben deze want nog zal wordt worden",
    "sv": "och i att det som en på är av för med till den har de inte om ett han men var jag sig från vi så kan när år under"
    " också efter eller nu sin där vid mot ska skulle kommer ut får finns vara hade alla mycket än",
    "pl": "w i na z się do nie to że jest o jak a od za po przez ale co dla jego tak są by być już czy tym tylko ich oraz"
    " może ma jej może ten było lub przed pod które który która go bardzo jako",
    "tr": "ve bir bu da de için ile olarak çok daha ne gibi o en kadar sonra var olan ama mi ben her ya şey değil ki mı ise"
    " içinde diye bile bana sen onu onun hem yok biz kendi iki zaman tarafından",
}
_SCRIPTS = {
    "ru": ((0x400, 0x52F),),
    "el": ((0x370, 0x3FF),),
    "he": ((0x590, 0x5FF),),
    "ar": ((0x600, 0x6FF), (0x750, 0x77F)),
    "hi": ((0x900, 0x97F),),
    "th": ((0xE00, 0xE7F),),
    "ja": ((0x3040, 0x30FF),),
    "zh": ((0x4E00, 0x9FFF), (0x3400, 0x4DBF)),
    "ko": ((0xAC00, 0xD7AF),),
    "latin": ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F)),
}
LANGUAGES = (*_FUNCTION_WORDS, *(name for name in _SCRIPTS if name != "latin"))
"""The languages that are told apart."""

_LEAST = 0.125
_JAPANESE = 0.1  # kana among Chinese characters


def language(words: Words) -> str | None:
    """The text's language, or None where it is none of `LANGUAGES` or too unlike running text to say."""
    counts = {
        name: sum(int(((words.codes >= low) & (words.codes <= high)).sum()) for low, high in ranges)
        for name, ranges in _SCRIPTS.items()
    }
    if not (letters := sum(counts.values())):
        return None
    if counts["ja"] > _JAPANESE * (counts["ja"] + counts["zh"]):
        counts["ja"] += counts.pop("zh")
    script = max(counts, key=lambda name: counts[name])
    if script != "latin":
        return script if 2 * counts[script] > letters else None
    known, spoken = _table()
    nearest = np.minimum(np.searchsorted(known, words.normalised), len(known) - 1)
    said = nearest[known[nearest] == words.normalised]
    hits = spoken @ np.bincount(said, minlength=len(known))
    best = int(hits.argmax())
    return LANGUAGES[best] if hits[best] >= _LEAST * len(words) else None


@cache
def _table() -> tuple[Hashes, npt.NDArray[np.int64]]:
    """All function words in order, and of each language which are its own."""
    lists = [Words(listed).normalised for listed in _FUNCTION_WORDS.values()]
    known = np.unique(np.concatenate(lists))
    return known, np.array([np.isin(known, listed) for listed in lists], np.int64)
