from entrenar.interop.hf import is_quantized, load_model, read_config, save_model

__all__ = ["is_quantized", "load_model", "read_config", "save_model"]
