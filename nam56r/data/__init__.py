"""Data sets: text and code files in Megatron's indexed format, and what is known of them."""

from nam56r.data.dataset import DataInfo
from nam56r.data.dataset import open_dataset as open
from nam56r.data.tokenizer import Tokenizer
from nam56r.data.writer import build

__all__ = ["DataInfo", "Tokenizer", "build", "open"]
