"""The only composer of the training half: each page puts the parts together in the order in which things happen."""

from entrenar import lazy

lazy.attach(__name__)
