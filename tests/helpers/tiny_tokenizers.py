"""Tokenizers of several kinds, trained on a few texts: bytes, sentence pieces, word pieces."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]


def fast(model, before, decoder, trainer, texts, **named):
    """A tokenizer trained on a few texts. Its tokens may span words if `before` does not split."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = before, decoder
    tokenizer.train_from_iterator(texts, trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=False))
    image = {"image_token": "<image>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=image, **names | named
    )


def byte_level(texts, size=400, regex=False):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "show_progress": False, "vocab_size": size}
    return fast(
        models.BPE(),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex, trim_offsets=False),
        decoders.ByteLevel(),
        trainers.BpeTrainer(initial_alphabet=alphabet, **options),
        texts,
    )


def sentence_pieces(texts, size=120):
    return fast(
        models.Unigram(),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
        trainers.UnigramTrainer(
            special_tokens=SPECIAL, unk_token="<unk>", vocab_size=size, show_progress=False
        ),
        texts,
    )


def word_pieces(texts, size=120):
    return fast(
        models.WordPiece(unk_token="<unk>"),
        pre_tokenizers.Whitespace(),
        decoders.WordPiece(),
        trainers.WordPieceTrainer(special_tokens=SPECIAL, vocab_size=size, show_progress=False),
        texts,
    )
