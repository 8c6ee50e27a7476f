"""Use a trained model: generate text, chat, and measure it on text."""

from entrenar import lazy

lazy.attach(__name__)
