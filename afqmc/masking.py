"""Which tokens make a word, which words stand for one another, and masks of them: what the sentences say themselves.

A word is a tuple of one to four tokens. V words
"""

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import accumulate, chain

import numpy as np
from scipy.sparse import coo_matrix
from sklearn.decomposition import TruncatedSVD

from afqmc.dataset import Split

SIZES = (4, 3, 2, 1)  # tokens of a word
SHARE = 0.3  # of a sentence's tokens that are masked; MacBERT has .15 and all of Wikipedia
IN_A_ROW = (0.4, 0.3, 0.2, 0.1)  # how often one, two, three and four words are
SIMILAR, ANY = 0.8, 0.1  # how often a similar word, and any word, stands for a masked one
Word = tuple[int, ...]


def find_words(rows: list[list[int]]) -> set[Word]:
    """All tokens, and two to four that stand together 20 times, e^3 times as often as any two parts by chance."""
    grams = Counter(chain.from_iterable(zip(*(row[n:] for n in range(size))) for row in rows for size in SIZES))
    total = sum(map(len, rows))

    def cohesion(gram: Word) -> float:
        parts = max(grams[gram[:n]] * grams[gram[n:]] for n in range(1, len(gram)))
        return math.log(grams[gram] * total / parts)

    return {gram for gram, count in grams.items() if len(gram) == 1 or (count >= 20 and cohesion(gram) > 3)}


def segment(row: list[int], words: set[Word]) -> list[Word]:
    """The words of a sentence from left to right, at each place the longest."""
    found, place = [], 0
    while place < len(row):
        found.append(next(part for size in SIZES if (part := tuple(row[place : place + size])) in words))
        place += len(found[-1])
    return found


def find_similar(sentences: list[list[Word]]) -> dict[Word, list[Word]]:
    """Of each word that occurs 5 times the 5 nearest of its size, by the words one and two places left and right.

    Nearest by the cosine of 100 dimensions of the positive pointwise mutual information (Levy et al. 2015, TACL 3).
    """
    words = sorted({*chain(*sentences)})
    numbers, V = {word: number for number, word in enumerate(words)}, len(words)
    flat = np.array([numbers[word] for word in chain(*sentences)])
    owners = np.repeat(np.arange(len(sentences)), [*map(len, sentences)])
    rows, columns = [], []
    for distance in (1, 2):
        inside = owners[:-distance] == owners[distance:]
        left, right = flat[:-distance][inside], flat[distance:][inside]
        rows += [left, right]
        columns += [right + V * (distance - 1), left + V * (distance + 1)]
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    counts = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(V, 4 * V)).tocsr().tocoo()  # equal ones summed
    by_context = np.bincount(columns, minlength=4 * V) ** 0.75
    chance = np.bincount(rows, minlength=V)[counts.row] * by_context[counts.col] / by_context.sum()
    counts.data = np.log(counts.data / chance).clip(min=0)
    vectors = TruncatedSVD(min(100, V), random_state=0).fit_transform(counts.tocsr())
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-9)
    often, sizes, similar = np.bincount(flat) >= 5, np.array([*map(len, words)]), {}
    for size in SIZES:
        some = np.flatnonzero(often & (sizes == size))
        nearest = some[np.argsort(-(vectors[some] @ vectors[some].T), axis=1)[:, :6]]
        similar |= {words[n]: [words[other] for other in row if other != n][:5] for n, row in zip(some, nearest)}
    return similar


def mask_words(
    split: Split, sentences: list[list[Word]], similar: dict[Word, list[Word]], seed: int
) -> tuple[Split, Split]:
    """The split with some words masked, and one with 1 in place of each masked token and 0 elsewhere.

    sentences: the words of each text of split.tokens, which no mask makes longer or shorter.
    """
    generator, tokens, frame = random.Random(seed), split.tokens, split.frame
    of_size = {size: sorted(word for word in {*chain(*sentences)} if len(word) == size) for size in SIZES}
    ids, masked = tokens.ids.copy(), np.zeros_like(tokens.ids)
    for start, sentence in zip(tokens.starts.tolist(), sentences):
        starts = [*accumulate(map(len, sentence), initial=start)]
        left = max(1, round(SHARE * (starts[-1] - start))) if sentence else 0
        while left > 0:
            first, count = generator.randrange(len(sentence)), generator.choices((1, 2, 3, 4), IN_A_ROW)[0]
            for word, place in zip(sentence[first : first + count], starts[first:]):
                if left <= 0 or masked[place]:
                    continue
                where, luck = slice(place, place + len(word)), generator.random()
                left, masked[where] = left - len(word), 1
                if luck < SIMILAR + ANY:
                    near = similar.get(word) if luck < SIMILAR else None
                    ids[where] = generator.choice(near or of_size[len(word)])
    zeros = frame._replace(before=frame.before * 0, between=frame.between * 0, after=frame.after * 0)
    marks = split._replace(tokens=replace(tokens, ids=masked, pad_token_id=0), frame=zeros)
    return split._replace(tokens=replace(tokens, ids=ids)), marks
