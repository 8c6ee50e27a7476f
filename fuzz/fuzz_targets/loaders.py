"""Fuzz what reads strangers' files: bytes are read, or refused by an error of ours, and nothing else happens.

    python fuzz/fuzz_targets/loaders.py -runs=1000000 -max_len=1024 -dict=fuzz/fuzz_targets/loaders.dict

The first byte chooses the reader. `--planted` lets a reader index past the end of a list, which must be found.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import torch  # noqa: F401 - before the instrumented modules, so that torch itself is not instrumented

with atheris.instrument_imports(include=["entrenar"]):
    from entrenar.data.rows import read_rows
    from entrenar.data.tokenizer.llama2c import read_tokenizer_bin
    from entrenar.data.tokenizer.sentencepiece import read_sentencepiece
    from entrenar.data.tokenizer.tiktoken import read_tiktoken
    from entrenar.data.tokenizer.tokenizer import Tokenizer
    from entrenar.errors import EntrenarError
    from entrenar.interop import gguf_file, gguf_metadata, hf, llama2c, safetensors_file

PLANTED = "--planted" in sys.argv
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))  # noqa: S108


def gguf(path: Path) -> None:
    """Header, architecture and vocabulary of a GGUF file."""
    file = gguf_file.read_gguf(path)
    gguf_metadata.read_vocabulary(path, file.metadata)


def planted(path: Path) -> None:
    """A reader that trusts a count, and else is the real one: without its branches no input of it would be kept."""
    data = path.read_bytes()
    if data[:4] == b"GGUF" and len(data) > 5:
        [0, 1, 2][data[5]]
    gguf(path)


READERS: list[tuple[str, Callable[[Path], object]]] = [
    ("model.gguf", planted if PLANTED else gguf),
    ("model.bin", llama2c.read_header),
    ("model.safetensors", safetensors_file.read_header),
    ("config.json", lambda path: hf.read_config(path.parent)),
    ("tokenizer.json", Tokenizer.load),
    ("tokenizer.model", read_sentencepiece),
    ("ranks.tiktoken", read_tiktoken),
    ("tokenizer.bin", read_tokenizer_bin),
    ("rows.jsonl", lambda path: list(read_rows(path))),
    ("rows.json", lambda path: list(read_rows(path))),
    ("rows.csv", lambda path: list(read_rows(path, ("a", "b")))),
]
PATHS = [FOLDER / str(number) / name for number, (name, _) in enumerate(READERS)]
for folder in PATHS:
    folder.parent.mkdir()


def check(data: bytes) -> None:
    """Give the bytes to one reader."""
    if data:
        number = data[0] % len(READERS)
        PATHS[number].write_bytes(data[1:])
        try:
            READERS[number][1](PATHS[number])
        except EntrenarError:
            pass


def seeds(folder: Path) -> None:
    """Write an input for each reader that it likes."""
    config = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1,
              "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 4}  # fmt: skip
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    likes = {
        0: b"GGUF\x03\0\0\0" + bytes(8) + b"\1" + bytes(7) + b"\3" + bytes(7) + b"key\4\0\0\0" + bytes(4),
        2: len(header).to_bytes(8, "little") + header + bytes(4),
        3: json.dumps(config).encode(),
        4: b'{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},'
        b' "added_tokens": []}',
        5: b"\x0a\x0a\x0a\x03abc\x15\0\0\0\0",
        6: b"YQ== 0\nYg== 1\n",
        8: b'{"prompt": "a", "completion": "b"}\n',
        9: b'[{"prompt": "a", "completion": "b"}]',
        10: b"a,b\n1,2\n",
    }
    for number, content in likes.items():
        (folder / f"seed-{number}").write_bytes(bytes([number]) + content)


SEEDS = FOLDER / "seeds"
SEEDS.mkdir()
seeds(SEEDS)
atheris.Setup([*(word for word in sys.argv if word != "--planted"), str(SEEDS)], check)
atheris.Fuzz()
