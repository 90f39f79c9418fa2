"""Mixed text to try tokenizers on: every script, emoji, marks, code, white space, control characters, look-alikes."""

import random

SURROGATES = range(0xD800, 0xE000)
STRETCH = 128  # Unicode's blocks begin at multiples of 16, most at multiples of 128
SPACES = " \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\u200b\ufeff"
CONTRACTIONS = (
    *("'s", "'S", "'t", "'T", "'re", "'RE", "'Re", "'ve", "'VE", "'m", "'M", "'ll", "'LL", "'lL", "'d", "'D"),
    *("'ſ", "’s", "'x", "'", "''s"),
)
EMOJI = (
    *(
        "😀",
        "👩\u200d👩\u200d👧\u200d👦",
        "🏳\ufe0f\u200d🌈",
        "👍🏽",
        "🧑🏿\u200d🚀",
        "🇩🇪🇫🇷",
        "1\ufe0f\u20e3",
        "❤\ufe0f",
    ),
    *("🫱🏻\u200d🫲🏾", "☺\ufe0e", "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"),
)
SPECIAL = (
    *("<|eot|>", "<|begin_of_text|>", "<|image|>", "<|patch|>", "<|python_start|>", "<|reserved_special_token_3|>"),
    *("<|vision_reserved_special_token_1|>", "<|vision_reserved_special_token_1047|>"),
)
LOOK_ALIKES = (
    *("<|eot|", "<|eot |>", "<|EOT|>", "<||eot|>", "<|nothing|>", "＜|eot|＞", "<|"),
    "<|reserved_special_token_9999|>",
)
WORDS = (
    *("the", "quick", "Brown", "naïve", "Größe", "STRASSE", "Łódź", "Ελληνικά", "Русский", "український", "עברית"),
    *(
        "العربية",
        "हिन्दी",
        "தமிழ்",
        "ไทย",
        "中文字符",
        "日本語",
        "ひらがな",
        "カタカナ",
        "한국어",
        "ქართული",
        "Հայերեն",
        "አማርኛ",
    ),
    *("Tiếng", "Việt", "camelCaseWord", "iPhone", "HTTPServer", "x86_64", "ǅ", "ʰ"),
)
CODE = (
    "def f(x):\n    return x**2  # comment\n",
    "for (int i = 0; i < 10; ++i) { a[i] <<= 1; }\r\n",
    '<div class="a">&amp;</div>',
    "SELECT * FROM t WHERE a != 'b';--\n\n\n",
    '{"k": [1.5e-3, null]}',
    "\\begin{x}$\\frac{a}{b}$",
    "a//b///c\n/",
    "#!/bin/sh\n\t\tset -e\n",
)
CONTROLS = (*range(32), *range(127, 160), 0xFFFD, 0xFFFF, 0x10FFFF)
SCRIPTS = (
    0x20,
    0xA0,
    0x370,
    0x400,
    0x590,
    0x600,
    0x900,
    0xE00,
    0x1100,
    0x1E00,
    0x3040,
    0x4E00,
    0xAC00,
    0x1F300,
    0x20000,
)


def texts(num_bytes, seed):
    """Texts of up to a few thousand characters, `num_bytes` of UTF-8 or a little more in all."""
    rng = random.Random(seed)
    done = 0
    for kind in _kinds(rng):
        text = kind()
        done += len(text.encode())
        yield text
        if done >= num_bytes:
            return


def every_stretch(per_stretch, seed):
    """Characters of every stretch of 128 code points, assigned or not, each among others of its kind and alone."""
    rng = random.Random(seed)
    parts = []
    for start in range(0, 0x110000, STRETCH):
        if start in SURROGATES:
            continue
        chars = [chr(start + rng.randrange(STRETCH)) for _ in range(per_stretch)]
        parts += ["".join(chars), f"a{chars[0]}A {chars[-1]}1{chars[0]}!{chars[-1]}\n", "\u0301".join(chars)]
        if len(parts) >= 90:
            yield "".join(parts)
            parts = []
    yield "".join(parts)


def _kinds(rng):
    """Endless makers of text, each in its turn."""

    def many(count, choices, ends=("",)):
        return "".join(rng.choice(choices) + rng.choice(ends) for _ in range(count))

    def words():
        return many(40, WORDS, (*CONTRACTIONS, "", " ", " ", ", ", "\n"))

    def script():  # neighbours in Unicode, as a text in one script has them
        start = rng.choice(SCRIPTS)
        return many(60, [chr(start + place) for place in range(256)], ("", "", "", " "))

    def spaces():
        runs = [space * length for space in SPACES for length in (1, 1, 2, 3, 17)]
        return many(40, runs, ("", "a", "1", "!", "中"))

    def digits():
        return many(rng.randrange(1, 60), "0123456789٣४½Ⅷ²")

    def controls():
        return many(30, [chr(point) for point in CONTROLS], ("", "x"))

    def marks():
        return many(30, "aeiouАи", ("", *(chr(rng.randrange(0x300, 0x370)) * rng.randrange(4) for _ in range(9))))

    def long_word():
        unit = rng.choice(["a", "ab", "-", "=", "Zz", "中", "é", "\u0301", "9", "👍", "\x00"])
        return unit * rng.randrange(50, 1500)

    def anything():
        points = [rng.randrange(0x110000) for _ in range(50)]
        return "".join(chr(point) for point in points if point not in SURROGATES)

    def pieces():
        return many(30, [*EMOJI, *SPECIAL, *LOOK_ALIKES, *CODE, *CONTRACTIONS, *WORDS, *SPACES])

    while True:
        yield from (words, script, spaces, digits, controls, marks, long_word, anything, pieces)
