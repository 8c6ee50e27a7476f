"""Other people's formats: each file is a load/save pair."""

from entrenar import lazy

lazy.attach(__name__)
