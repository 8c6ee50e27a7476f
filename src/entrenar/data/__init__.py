"""Text to batches: tokenizers, corpora on disk, and the loader."""

from entrenar.data.batch import Batch, LoaderState
from entrenar.data.corpus import Corpus, CorpusManifest, check_same_tokenizer
from entrenar.data.loader import Loader, validation_batches
from entrenar.data.prepare import PrepareConfig, Progress, prepare
from entrenar.data.settings import DataConfig
from entrenar.data.sft import SftRows, accept, read_examples, split, total_tokens, write_quarantine
from entrenar.data.sft_encode import Example
from entrenar.data.sft_loader import SftLoader, SftState, held_out_batches
from entrenar.data.sft_settings import SftConfig
from entrenar.data.token_bytes import DecodeStream
from entrenar.data.tokenizer import Tokenizer
from entrenar.data.train_bpe import train_bpe

__all__ = [
    "Batch",
    "Corpus",
    "CorpusManifest",
    "DataConfig",
    "DecodeStream",
    "Example",
    "Loader",
    "LoaderState",
    "PrepareConfig",
    "Progress",
    "SftConfig",
    "SftLoader",
    "SftRows",
    "SftState",
    "Tokenizer",
    "accept",
    "check_same_tokenizer",
    "held_out_batches",
    "prepare",
    "read_examples",
    "split",
    "total_tokens",
    "train_bpe",
    "validation_batches",
    "write_quarantine",
]
