"""Choose a width for each matrix of a model, and round the model to a budget of bits."""

from entrenar import lazy

lazy.attach(__name__)
