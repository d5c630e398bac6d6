"""Rules that put together the words that a corpus has cut apart, before they are tokenized.

The rules are those behind MDLM's zero-shot table (Sahoo et al. 2024, table 3; `dataloader.py` of its repository),
which BD3-LM's repeats: without them no perplexity is comparable with the published ones. One of theirs is left out: it
matches nothing but a slash, an apostrophe, a blank, a digit and a slash.
"""

import re

Rules = list[tuple[str, str]]  # patterns and what replaces them, one after the other


def _attached(marks: str) -> Rules:
    """Each mark goes to the word before it."""
    return [(f" {re.escape(mark)} ", f"{mark} ") for mark in marks]


WIKITEXT: Rules = [
    ("s '", "s'"),
    *((f" @{re.escape(mark)}@ ", mark) for mark in "-,."),  # within numbers and compounds
    *_attached(":;.!?,"),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    *((" ".join("=" * level), "=" * level) for level in (4, 3, 2)),  # headings
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]
PTB: Rules = [
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    (r"\\/", "/"),
    (" N(?= )", " 1"),  # every number
    (r"([$#]) 1", r"\g<1>1"),
    ("<unk>", "?"),
]
LM1B: Rules = [
    (r"(https?) : / / ", r"\1://"),
    (r" '(\w+)", r"'\1"),
    (r" (\w+) \. ", r" \1. "),
    (r" (\w+) \.$", r" \1."),
    *(rule for mark in "?!" for rule in (*_attached(mark), (rf" \{mark}$", mark))),
    *_attached(",:;"),
    (" / ", "/"),
    (r'" ([^"]+) "', r'"\1"'),
    (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^][]+) \]", r"[\1]"),
    (r"([$£]) ", r"\1"),
]
LAMBADA: Rules = [("[“”]", '"'), (r"\s+\Z", ""), (r"\A\s*", "\n")]  # a text starts on a line of its own

RULES: dict[str, Rules] = {
    "wikitext": WIKITEXT,
    "ptb": PTB,
    "lm1b": LM1B,
    "lambada": LAMBADA,
    "papers": WIKITEXT + LM1B,
}


def detokenize(text: str, rules: str) -> str:
    """A text as people write it, from one that is cut into words as `rules`, a key of `RULES`, says."""
    for pattern, replacement in RULES[rules]:
        text = re.sub(pattern, replacement, text)
    return text
