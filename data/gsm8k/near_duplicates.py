"""Similarity of questions, independent of numbers, case, punctuation and white space."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

SHINGLE_LENGTH = 3  # words
# Four of GSM8K's training problems have at least this similarity to a test problem (0.84, 0.84, 0.68, 0.51): they
# differ in numbers and a name. The next one (0.44) asks for something else.
NEAR_DUPLICATE = 0.5
WORD = re.compile(r"[^\W\d_]+|\d[\d,]*(?:\.\d+)?")


def shingles(text: str) -> set[tuple[str, ...]]:
    """Return all runs of three words of a text, with every number replaced by 0; a shorter text is a single run."""
    words = ["0" if word[0].isdigit() else word for word in WORD.findall(text.lower())]
    return {tuple(words[i : i + SHINGLE_LENGTH]) for i in range(max(1, len(words) - SHINGLE_LENGTH + 1))}


def highest_similarities(questions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the similarity of each question to its most similar reference, in [0, 1]; 0 without references.

    The similarity of two texts is the Jaccard index of their [`shingles`]. Texts with a similarity of at least
    `NEAR_DUPLICATE` are near-duplicates.
    """
    sets_of_references = [shingles(reference) for reference in references]
    references_with = defaultdict(list)
    for number, reference in enumerate(sets_of_references):
        for shingle in reference:
            references_with[shingle].append(number)
    highest = []
    for question in map(shingles, questions):
        shared = Counter(number for shingle in question for number in references_with.get(shingle, ()))
        unions = ((count, len(question) + len(sets_of_references[number]) - count) for number, count in shared.items())
        highest.append(max((count / union for count, union in unions), default=0.0))
    return highest
