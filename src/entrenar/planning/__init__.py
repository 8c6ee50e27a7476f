"""Memory and time of a run, before it is run."""

from entrenar import lazy

lazy.attach(__name__)
