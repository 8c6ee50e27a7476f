"""One tokenizer for every LLaMA, read from any of the formats it is published in."""
