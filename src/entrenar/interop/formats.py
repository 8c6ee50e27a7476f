"""The formats that a model can be written in."""

from typing import Literal

Format = Literal["hf", "llama2c", "gguf", "nf4", "nf-bits"]
