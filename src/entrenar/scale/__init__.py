"""Ranks on torch.distributed: several processes, started by torchrun, that train one model on shares of each batch."""

from entrenar import lazy

lazy.attach(__name__)
