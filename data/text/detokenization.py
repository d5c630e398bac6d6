"""Detokenization of corpora whose words and punctuation are separated by spaces.

The rules are those of MDLM's zero-shot table (Sahoo et al. 2024, table 3; `dataloader.py` of its repository), which
BD3-LM reuses: perplexities are comparable with the published ones only under these rules. One rule is omitted: it
matches only a slash, an apostrophe, a space, a digit and a slash.
"""

import re

Rules = list[tuple[str, str]]  # pattern and replacement, applied in order


def _attached(marks: str) -> Rules:
    """Return rules that attach each mark to the word before it."""
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
LAMBADA: Rules = [("[“”]", '"'), (r"\s+\Z", ""), (r"\A\s*", "\n")]  # a text starts on a new line

RULES: dict[str, Rules] = {
    "wikitext": WIKITEXT,
    "ptb": PTB,
    "lm1b": LM1B,
    "lambada": LAMBADA,
    "papers": WIKITEXT + LM1B,
}


def detokenize(text: str, rules: str) -> str:
    """Detokenize a text by the rules `RULES[rules]`."""
    for pattern, replacement in RULES[rules]:
        text = re.sub(pattern, replacement, text)
    return text
