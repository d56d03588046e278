"""Megatron's tokenizers by the names its own `--tokenizer-type` uses, plus its byte-level one."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from nam56r.records import Frozen

if TYPE_CHECKING:
    from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText

# type -> Megatron's library name, and the package it needs
LIBRARIES = {
    "ByteLevelTokenizer": ("byte-level", None),
    "HuggingFaceTokenizer": ("huggingface", "transformers"),
    "SentencePieceTokenizer": ("sentencepiece", "sentencepiece"),
    "TikTokenizer": ("tiktoken", "tiktoken"),
}


class Tokenizer(Frozen):
    """A tokenizer's name and, except for the byte-level one, its model: a file, a folder or a hub name."""

    type: str = "ByteLevelTokenizer"
    model: str | None = None

    @property
    def name(self) -> str:
        return f"{self.type} {self.model}" if self.model else self.type

    def load(self) -> MegatronTokenizerText:
        """Megatron's tokenizer object (`tokenize`, `detokenize`, `vocab_size`, `eod`).

        Raises ValueError when the type is unknown, its package is not installed, the model is missing or can't be
        read, or it has no end-of-document id.
        """
        if self.type not in LIBRARIES:
            raise ValueError(f"tokenizer type is {self.type!r}, but must be one of {', '.join(LIBRARIES)}")
        library, package = LIBRARIES[self.type]
        if package and not self.model:
            raise ValueError(f"{self.type} needs a model (--tokenizer-model)")
        if package is None and self.model:
            raise ValueError(f"{self.type} takes no model, but --tokenizer-model is {self.model!r}")
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(f"{self.type} needs the package {package}, which is not installed")

        from megatron.core.tokenizers import MegatronTokenizer

        try:
            tokenizer = MegatronTokenizer.from_pretrained(self.model, metadata_path={"library": library})
        except Exception as error:  # each library raises its own
            raise ValueError(f"{self.type} can't be loaded from {self.model!r}: {error}") from error
        if tokenizer.eod is None:
            raise ValueError(f"{self.type} {self.model!r} has no end-of-document id, which every document ends with")
        return tokenizer


BYTE_LEVEL = Tokenizer()
