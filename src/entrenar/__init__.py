"""Train and fine-tune LLaMA models on the machine you have, and show that what was done was right.

Importing the package loads nothing: each part (`entrenar.ops`, `entrenar.model`, `entrenar.data`, …) is imported by
name.
"""

__version__ = "0.1.0"
