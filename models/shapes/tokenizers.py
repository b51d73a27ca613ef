"""Tokenizers of the bundled models: every word of the grammar is one token, anything else falls apart into letters."""

import string
from collections.abc import Sequence
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, T5Tokenizer

from models.shapes.shapes import COLOURS, RADII, RELATIONS, SHAPES

MAX_TOKENS = 24  # the longest caption takes 18
_WORD_END = "</w>"


def words() -> list[str]:
    """Every word of the grammar, in a fixed order."""
    relation_words = [word for relation in RELATIONS for word in relation.split()]
    return list(dict.fromkeys(["a", "on", "background", *RADII, *COLOURS, *SHAPES, *relation_words]))


def clip_tokenizer(further: Sequence[str] = ()) -> CLIPTokenizer:
    """CLIP's byte-level BPE with just enough merges that each word, of the grammar or `further`, is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + _WORD_END for letter in alphabet)]
    merges = _merges([*words(), *further])
    pieces = list(dict.fromkeys([*pieces, *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _merges(vocabulary: Sequence[str]) -> list[tuple[str, str]]:
    """Merges under which each word becomes one piece.

    A word first goes through the merges of the words before it; what is left is joined from the front. Later merges
    rank lower, so they never disturb an earlier word. (BpeTrainer breaks ties differently from run to run.)
    """
    merges: list[tuple[str, str]] = []
    for word in vocabulary:
        while len(pieces := _split(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    return merges


def _split(word: str, merges: Sequence[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding: the pair of the lowest rank is joined until no known pair is left."""
    pieces = [*word[:-1], word[-1] + _WORD_END]
    while known := [pair for pair in pairwise(pieces) if pair in merges]:
        at = list(pairwise(pieces)).index(min(known, key=merges.index))
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def t5_tokenizer() -> T5Tokenizer:
    """T5's unigram model over whole words, letters, digits and punctuation."""
    space = "▁"
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (space, -4.0)]
    letters = string.ascii_lowercase + string.digits + string.punctuation
    vocabulary = [*special, *((space + word, -1.0) for word in words()), *((letter, -8.0) for letter in letters)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_TOKENS)
