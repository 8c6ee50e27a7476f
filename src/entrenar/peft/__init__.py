"""Fine-tuning a few parameters of a frozen model."""

from entrenar import lazy

lazy.attach(__name__)
