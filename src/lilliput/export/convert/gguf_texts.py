"""Two hundred strings on which two tokenizers that differ in anything that matters differ somewhere."""

from __future__ import annotations

from collections.abc import Sequence

COUNT = 200
PROSE = (
    "The river was high that spring, and nobody in the village could remember when the bridge had last been closed. "
    "On the 3rd of May, at half past 7, two carpenters came down with 12 planks and a lamp; by midnight it was open."
)
_PLAIN = (
    "", "a", "Hello", "Hello, world!", "hello world", "HELLO WORLD", " Hello", "Hello ", "  Hello",
    "Hello  world", "It's", "it's we'll they've I'd you're I'm she's", "IT'S WE'LL THEY'VE",
    "don't can't won't", "'tis 'twas", "’s ’ll", "The quick brown fox jumps over the lazy dog.",
    "antidisestablishmentarianism", "state-of-the-art", "e-mail", "a.b.c", "aaaaaaaaaaaaaaaa", "zzz",
    "Mr. Smith went to Washington, D.C., in 1999.", "What?! No... really?!",
    "(brackets) [square] {curly} <angle>", "\"double\" 'single' “curly” ‘quotes’ «guillemets»",
    "one/two\\three|four", "a_b__c___d", "CamelCaseWordsTogether", "snake_case_words_together",
    "UPPERlowerMiXeD", "http://example.org/path?query=1&other=2#part", "user@example.org",
)  # fmt: skip
_NUMBERS = (
    "0", "1", "12", "123", "1234", "12345", "123456", "1234567890", "3.14159", "-17", "+4", "1,000,000", "1e-5",
    "0xff", "50%", "$5.00", "€20", "2026-11-28", "12:34:56", "1st 2nd 3rd 4th", "v1.2.3", "a1b2c3", "x2", "2x",
    "10 000", "007", "½ ¼ ²³", "١٢٣", "१२३", "Ⅳ ⅷ", "1️⃣", "192.168.0.1", " 1 22 333 4444", "3+4=7", "9.8m/s²",
)  # fmt: skip
_SPACES = (
    " ", "  ", "   ", "    ", "        ", "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", " \n",
    "\n ", " \n ", "\t\n", "a\nb", "a\n\nb", "a \n b", "a\tb", "a  b", "a   b", "a    b", "\n\na", "a\n\n",
    "  a  ", "\ta\t", "a\r\nb", "end.\n", "end.\n\nNext", "a\u00a0b", "a\u2003b", "a\u200bb", "\u3000全角",
    "x  \n  y", "   \n\n   z", ".\n", "!\n\n\n?",
)  # fmt: skip
_CODE = (
    "def f(x):\n    return x + 1\n", "for (int i = 0; i < 10; ++i) {\n\tsum += a[i];\n}",
    "if x == 1 and y != 2: pass", "print(f\"{name!r:>10}\")", "SELECT * FROM t WHERE id = 42;",
    "<div class=\"a\">text</div>", "x = {'a': [1, 2, 3]}", "// comment\n/* block */",
    "# heading\n\n- item\n- item", "a->b::c.d[e](f)", "!= == <= >= && || ++ -- << >>", "#!/bin/sh\n",
    "\\frac{a}{b} \\alpha_1^2", "```python\nx\n```", "import os, sys", "λ x. x",
    "    indented\n        deeper\n    back", "import numpy as np\n\n\nclass A:\n\tpass",
    "{\n  \"key\": null\n}", "======== -------- ........", "a=b;c=d;;", "\"\\n\\t\\\\\"",
)  # fmt: skip
_SCRIPTS = (
    "naïve café résumé", "Ünïcödé Straße ẞ", "Ångström", "Łódź żółć", "Привет, мир!", "Γειά σου Κόσμε",
    "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "你好，世界！", "こんにちは世界", "カタカナ ｶﾀｶﾅ",
    "안녕하세요 세계", "สวัสดีชาวโลก", "Xin chào thế giới", "İstanbul ılık", "ﬁ ligature", "e\u0301 é",
    "A\u030a Å", "ｆｕｌｌｗｉｄｔｈ", "русский текст и English text", "漢字とkanji混ぜる", "ꙮ", "𝕳𝖊𝖑𝖑𝖔", "ʰʷ",
    "ß", "Ǆ ǅ ǆ", "ქართული", "አማርኛ", "\ufeffbom",
)  # fmt: skip
_SIGNS = (
    "😀", "😀😀", "👍🏽", "👩‍👩‍👧‍👦", "🇩🇪🇫🇷", "text 😀 text", "❤️", "☃", "→ ← ↔", "∑∫√∞≠≤", "™®©", "…", "—–-",
    "•·°", "\u0000", "\u0007", "\x7f", "§¶†", "♠♣♥♦", "▁", "▁a", "a▁b", "Ġ", "Ċ", "�", "🤖code", "😀1", "1😀",
    " 😀 ", "~`^",
)  # fmt: skip
_CHAT = (
    "<|im_start|>user\nHi<|im_end|>\n", "[INST] Hi [/INST]", "<start_of_turn>user\nHi<end_of_turn>\n",
    "<s>Hi</s>", "<|user|>\nHi<|end|>\n", "<|begin_of_text|>Hi<|eot_id|>", "<bos>Hi<eos>", "<|endoftext|>",
    "<unk>", "<0x0A>", "<pad>",
)  # fmt: skip


def texts(markers: Sequence[str]) -> tuple[str, ...]:
    """At least `COUNT` strings, each once; `markers`, tokens that a chat is marked with, stand alone, within text and
    one after the other."""
    own = [text for x in markers for text in (x, f"{x}user\nWhat is 1 + 1?{x}\n", f"Hi {x} there", f"{x}{x}")]
    plain = (*_PLAIN, *_NUMBERS, *_SPACES, *_CODE, *_SCRIPTS, *_SIGNS, *_CHAT, *own)
    return tuple(dict.fromkeys((*plain, PROSE)))
