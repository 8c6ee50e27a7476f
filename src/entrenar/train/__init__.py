"""The engine of the training half: it knows modules, iterators of batches and callables, not language models."""

from entrenar import lazy

lazy.attach(__name__)
