"""A byte tokenizer, a small byte-level BPE trained on the training split, and the tokenizer of a given model."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trialist.data import assets

BYTES = "bytes"
SPECIAL = ("<bos>", "<eos>", "<pad>")
SMALLEST_BPE = 256 + len(SPECIAL)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, its id the byte's value; `<bos>` 256, `<eos>` 257, `<pad>` 258.

    Encoding adds no special token, and text that spells one (`"<bos>"`) is encoded as its bytes.
    """
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    return _fast(Tokenizer(models.BPE(vocab=vocabulary, merges=[])), use_regex=False)


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its ids are the bytes of the text, so that `encode_documents` need not run it."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.vocab_size != 256:
        return False
    vocabulary = tokenizer.get_vocab()
    return all(vocabulary.get(character) == byte for byte, character in enumerate(byte_characters()))


def bpe_tokenizer(texts: Sequence[str], vocab_size: int, cache: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `vocab_size` tokens, the 256 bytes and `<bos>`, `<eos>`, `<pad>` among them.

    texts: the training split, never the test text. A tokenizer trained once on these texts is read from the user cache.
    """
    if vocab_size < SMALLEST_BPE:
        raise ValueError(
            f"vocab_size must be at least {SMALLEST_BPE} (256 bytes and {len(SPECIAL)} specials), not {vocab_size}"
        )
    if not any(texts):
        raise ValueError("a BPE tokenizer needs training text; every text is empty")
    if not cache:
        return _train_bpe(texts, vocab_size)
    digest = hashlib.sha256(f"{vocab_size} {tokenizers.__version__}".encode())
    for text in texts:
        content = text.encode()
        digest.update(f"\0{len(content)}\0".encode())
        digest.update(content)
    folder = assets.cache_folder() / "tokenizers" / digest.hexdigest()[:32]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                staging = tempfile.mkdtemp(dir=folder.parent, prefix=".building-")
                try:
                    _train_bpe(texts, vocab_size).save_pretrained(staging)
                    os.replace(staging, folder)
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer `bytes`, or that of a built-in model, a local model folder or a Hub id.

    Raises ValueError for a folder without tokenizer files, FileNotFoundError for a missing folder or unknown Hub id.
    """
    if model == BYTES:
        return byte_tokenizer()
    place = str(assets.path(model)) if model in assets.ASSETS else model
    folder = Path(place)
    if folder.is_dir():
        found = sorted(file.name for file in folder.iterdir())
        if not {
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
            "vocab.txt",
            "spiece.model",
            "tokenizer_config.json",
        } & set(found):
            raise ValueError(
                f"model folder {model!r} has no tokenizer: expected tokenizer.json or tokenizer.model, found "
                f"{', '.join(found) or 'nothing'}; save one with tokenizer.save_pretrained({model!r})"
            )
    elif place.startswith((".", "/", "~")) or place.count("/") > 1:
        raise FileNotFoundError(f"model {model!r}: no such folder")
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"model {model!r}: no tokenizer could be loaded ({error}); pass a folder with a tokenizer, "
            f"a Hub id that is in the cache or reachable, or {BYTES!r}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise what a damaged file makes of them
        raise ValueError(
            f"model {model!r}: its tokenizer is there but could not be loaded ({type(error).__name__}: {error}); its files "
            "may be damaged: save or download it again"
        ) from error


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text without special tokens, int32 (uint8 for the byte tokenizer)."""
    if is_byte_tokenizer(tokenizer):
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.asarray(ids, np.int32) for ids in encoded]


def document_start(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands before a document: the tokenizer's BOS, else its EOS (GPT-2, Qwen), else None."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _train_bpe(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # the bytes come first, as in the byte tokenizer, and the specials are added behind the merges
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL), initial_alphabet=byte_characters(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return _fast(tokenizer, use_regex=True)


def _fast(tokenizer: Tokenizer, *, use_regex: bool) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def byte_characters() -> list[str]:
    """The printable character that stands for each byte 0..255 in byte-level tokenizers (GPT-2's table).

    Printable Latin-1 bytes stand for themselves; the others take the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    following = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(following)) for byte in range(256)]
