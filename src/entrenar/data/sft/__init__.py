"""Supervised fine-tuning data: from files of rows to batches of examples with their trained tokens marked."""
