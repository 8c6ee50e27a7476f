from entrenar.data.batch import Batch, LoaderState
from entrenar.data.corpus.corpus import Corpus, CorpusManifest, check_same_tokenizer
from entrenar.data.corpus.loader import Loader, validation_batches
from entrenar.data.corpus.prepare import Progress, prepare
from entrenar.data.corpus.settings import PrepareConfig
from entrenar.data.settings import DataConfig
from entrenar.data.sft.encode import Example
from entrenar.data.sft.examples import SftRows, accept, grouped, read_examples, split, total_tokens, write_quarantine
from entrenar.data.sft.loader import SftLoader, SftState, held_out_batches
from entrenar.data.sft.settings import SftConfig
from entrenar.data.tokenizer.token_bytes import DecodeStream
from entrenar.data.tokenizer.tokenizer import Tokenizer
from entrenar.data.tokenizer.train_bpe import train_bpe

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
    "grouped",
    "held_out_batches",
    "prepare",
    "read_examples",
    "split",
    "total_tokens",
    "train_bpe",
    "validation_batches",
    "write_quarantine",
]
