"""Other people's formats: each file is a load/save pair."""

from entrenar.interop.hf import load_model, read_config, save_model

__all__ = ["load_model", "read_config", "save_model"]
