"""Texts to token ids, with the tokenizer of a Hugging Face directory."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from tokenizers import normalizers

from piccolo_jax.errors import UserError

_REMEDY = "name a directory with one, or with tokenizer.json, in config.model.tokenizer"


class Tokenizer:
    """A fast Hugging Face tokenizer, with its special tokens put around each text.

    `lower_case` puts texts in lower case first, as `do_lower_case` of sentence-transformers does;
    transformers forgets it when it saves and loads a tokenizer. Raises UserError if the directory
    or hub id holds no fast tokenizer. Never runs remote code.
    """

    def __init__(self, path: str | Path, lower_case: bool = False):
        try:
            self.hf = transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        except Exception as error:  # tokenizers raises bare ones
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            heading = len(lines) > 1 and lines[0].endswith(":")
            reason = lines[heading] if lines else type(error).__name__
            raise UserError(
                f"{path}: no tokenizer can be loaded from here ({reason}); {_REMEDY}"
            ) from None
        if not self.hf.is_fast:
            raise UserError(f"{path}: the tokenizer has no tokenizer.json (a fast tokenizer)")
        if len(self.hf) <= len(self.hf.all_special_ids):  # what transformers makes of no files
            raise UserError(
                f"{path}: holds no tokenizer (tokenizer.json or vocab.txt with words); {_REMEDY}"
            )
        self._backend = self.hf.backend_tokenizer
        self.lower_case = lower_case
        if lower_case:
            _lower(self._backend)
        self._backend.no_padding()
        self._backend.no_truncation()
        self.fingerprint = hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[list[np.ndarray], list[bool]]:
        """Token ids, int32 [length <= max_length], and whether each text was cut."""
        self._backend.enable_truncation(max_length)
        encodings = self._backend.encode_batch_fast(list(texts))
        self._backend.no_truncation()  # nor in what is exported
        ids = [np.asarray(e.ids, np.int32) for e in encodings]
        return ids, [bool(e.overflowing) for e in encodings]


def _lower(backend: tokenizers.Tokenizer) -> None:
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
