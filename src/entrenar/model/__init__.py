"""The LLaMA: its shape, its weights, its key/value cache."""

from entrenar import lazy

lazy.attach(__name__)
