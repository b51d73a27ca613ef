"""Tokenizers of the bundled models: every word of the grammar is one token, anything else falls apart into letters."""

import json
import string

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from models.training.shapes import COLOURS, RADII, RELATIONS, SHAPES

MAX_TOKENS = 24  # the longest caption takes 18


def words() -> list[str]:
    """Every word of the grammar, in a fixed order."""
    relation_words = [word for relation in RELATIONS for word in relation.split()]
    return list(dict.fromkeys(["a", "on", "background", *RADII, *COLOURS, *SHAPES, *relation_words]))


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with just enough merges that each word is one token."""
    suffix = "</w>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix=suffix, show_progress=False)
    bpe.train_from_iterator(words(), trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    letters = [*alphabet, *(letter + suffix for letter in alphabet)]
    pieces = dict.fromkeys([*letters, *map("".join, merges), "<|startoftext|>", "<|endoftext|>"])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """T5's unigram model over whole words, letters, digits and punctuation."""
    space = "▁"
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (space, -4.0)]
    letters = string.ascii_lowercase + string.digits + string.punctuation
    vocabulary = [*special, *((space + word, -1.0) for word in words()), *((letter, -8.0) for letter in letters)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_TOKENS)
