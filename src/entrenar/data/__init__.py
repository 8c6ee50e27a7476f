"""Text to batches: tokenizers, corpora on disk, and the loader."""

from entrenar import lazy

lazy.attach(__name__)
