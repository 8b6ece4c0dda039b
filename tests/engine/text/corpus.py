"""Texts on which tokenizers go wrong, and a generator of many more from their pieces."""

from __future__ import annotations

import random

CODE = '''\
def fib(n: int) -> int:
    """Return the n-th Fibonacci number."""
    if n < 2:  # base case
\treturn n
    return fib(n-1) + fib(n - 2)


for (int i = 0; i < 10; ++i) { a[i] += b[i] << 2; }   // don't
SELECT * FROM t WHERE x >= 1e-9 AND y != 'it''s';
<div class="a-b_c">&nbsp;</div>\r\n\r\n#include <stdio.h>\r\n
$ curl -sSL https://example.com/?q=a%20b&c=[1,2] | jq '.[0]' >> /dev/null 2>&1
\\begin{align} \\frac{1}{2} \\end{align}
'''

TEXTS = (
    "",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t\n",
    " \n",
    "\r\n\r\n  \r\n",
    "Hello world",
    " Hello world",
    "Hello  world   and    more     spaces      ",
    "   leading and trailing   ",
    "\n =",
    "' era",
    "a\n b\n  c\n   d\n\n  e",
    "tabs\tand\t\tmore\t\t\ttabs \t mixed\t ",
    "line one\nline two\r\nline three\rline four\n\n\n\nafter four",
    "   \n   \n  x  \n\n   ",
    CODE,
    "I'm you're he's we've they'll I'd don't IT'S WE'RE I'LL YOU'VE 'TIS '90s 's 'S 're 'RE 'Ll 'vE ''' '' 'x",
    "'ſ 'st 'ree l'été aujourd'hui D'ARTAGNAN'S rock'n'roll o'clock’s it’s",
    "it'STOP a'TIS a'MORE a'DON'T a'LLAMA a'REAL a'VERY b'STOP b'TIS b'MORE b'DON'T b'LLAMA b'REAL b'VERY a'ReAL",
    "1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 0x1F 1e10 ٣٤٥٦ ३४५६ ½ Ⅻ ² 12ab34cd 2024-01-15T10:20:30Z",
    "000111222333444555 7 77 777 7777 77777 ①②③④ 一二三四五 〇",
    "中文测试：你好，世界！我们在2024年12月使用「引号」——还有破折号……和　全角空格。",
    "。　、　！　全角　空格 　　连续",
    "日本語のテキスト、ひらがなとカタカナとー長音。今日は１２３円です。ﾊﾝｶｸ々〆ヶ",
    "한국어 텍스트입니다. 안녕하세요! ㅋㅋㅋ ㅠㅠ 조선말 123개",
    "中文mixed with English和日本語テスト한국어all at once한자漢字abc漢字's漢字S",
    "㐀㐁 𠀀𠀁𪛖 豈更車 﨎 ⺀⼀ 龦龧 㐂abc 中'll",
    "مرحبا بالعالم، كيف حالك؟ النص العربي مع تشكيل: مُحَمَّد ١٢٣ ﷺ",
    "שלום עולם! נִקּוּד",
    "Привет, мир! Ёжик ЁЛКА Ґ Ўў",
    "Ελληνικά: Ὀδυσσεύς, ᾳ ῼ Ω µ",
    "नमस्ते दुनिया हिन्दी বাংলা தமிழ் తెలుగు ไทยภาษา ພາສາລາວ ខ្មែរ မြန်မာ ქართული ᲥᲐᲠᲗᲣᲚᲘ አማርኛ ᏣᎳᎩ",
    "naïve café Zürich Ångström cafe\u0301 e\u0301e\u0301 o\u0302\u0323 A\u030a \u0301alone Ǆ ǅ ƻ ǀ ʔ ß ẞ ﬁ ﬀ",
    "🙂 😀😃😄 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ ☎️ 1️⃣ 🧑🏿‍🚀 ✔ ⚠️text🚀text 🦙.cpp",
    "zero\u200bwidth\u200djoin\u200cer \ufeffbom \u00adsoft \u2060word",
    "nbsp\u00a0here\u00a0\u00a0two thin\u2009space em\u2003space\u3000full width",
    "line\u2028sep\u2029para\u0085nel\u000bvt\u000cff",
    " \u00a0 \u3000 \u2003\u2003x \u00a0\u00a0\n\u00a0y \u3000\n",
    "control \u0000 \u0001\u0002 \u001b[31mred\u001b[0m \u007f\u0080\u009f",
    "private \ue000\uf8ff unassigned \u0378\u0379 nonchar \ufffe tags \U000e0001 \U0010fffd \ufffd\ufffd",
    "!@#$%^&*()_+-=[]{}|;:'\",.<>/?`~ !!! ??? ... --- *** === ### @@@ ~~~ ::: ;;; ^^ || $$ ++ <=> -> => !=",
    "«quotes» “curly” ‘single’ „low“ ‹x› – — … • · † ‡ § ¶ © ® ™ ° € £ ¥ ₿ ± × ÷ √ ∞ ∑ ∫ ≠ ≤ → ⇒ ∀∃",
    "（全角）！＂＃＄％＆＇；：＠［＼］＾＿｀｛｜｝～ＡＢＣａｂｃ１２３",
    ".\n\n..\n ...\r\n;\n\n\n}\n}\n\n)\t\n!\n?\r\r\n",
    "x = y;\n\n\n  }  \n\n\t\t}\n/* c */ // d\n",
    "$a_b-c.d/e:f #tag @user _under__score_ __init__ camelCaseWord HTTPServer XMLHttpRequest snake_case_2",
    ".a ,b ;c -d /e 'f \"g (h [i {j <k @l #m $n %o ^p &q *r =s +t |u ~v `w \\x !y ?z :é _é .中",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "a" * 700 + " " * 300 + "\n" * 120 + "=" * 200 + "1" * 100,
    " ".join("word" * n for n in range(1, 12)),
    "▁already ▁▁escaped▁ Ġbyte ĊĠchars <0x0A><0xFF> <0x41",
    "<s>text</s> <s> </s><unk> <pad> [INST] hi [/INST] <<SYS>>",
    "<|endoftext|>x<|endoftext|> <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|> <|python_tag|>",
    "<｜begin▁of▁sentence｜>Hi<｜User｜>a<｜Assistant｜>b<｜end▁of▁sentence｜><|EOT|>",
    "<|user|>\n  hi <|end|>\n\n<|assistant|>  \t yes<|endoftext|>   no <|im_start <|im_end| >|> <s <<s>> </s></s>",
    "[BOS][EOS] [EOT] <|im_user|>user<|im_middle|>x<|im_system|> <reponame><file_sep><|fim_prefix|>a<fim_prefix>",
)

PIECES = (
    " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "a", "b", "The", "word",
    "HELLO", "é", "e\u0301", "\u0301", "1", "22", "333", "4444", "٣", "½", "中", "文字", "か", "カナ", "ー", "한글",
    "م", "مرحبا", "я", "Ω", "'", "'s", "'S", "'ll", "'Re", "'d", "’s", ".", ",", "...", "!", "?", ";", ":", "-",
    "_", "(", ")", "{", "}", "[", "]", "<", ">", "/", "\\", "\"", "#", "$", "+", "=", "~", "|", "`", "^", "。",
    "，", "「", "」", "！", "～", "“", "”", "—", "…", "🙂", "👩‍🚀", "🇩🇪", "€", "±", "\u200d", "\u0000", "\u0085",
    "\ufffd", "\u0378", "\ue000", "ƻ", "ǅ", "ไทย", "हि", "𠀀", "豈", "𝒳", "▁", "<s>", "</s>", "<|im_end|>",
)  # fmt: skip


def random_texts(count: int, seed: int = 0) -> list[str]:
    """`count` texts of 1 to 24 pieces each; the same for the same seed."""
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randint(1, 24))) for _ in range(count)]
