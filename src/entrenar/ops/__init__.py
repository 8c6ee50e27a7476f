"""Operations with hand-derived gradients, and the weights in few bits that they read.

A file with an operation holds its derivation, a plain reference, the arithmetic of forward and backward with the
equations it follows, the `autograd.Function`, and the public operation.
"""

from entrenar import lazy

lazy.attach(__name__)
