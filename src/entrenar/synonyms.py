"""Names that other programs give to our settings, for the messages about unknown flags and keys."""

from collections.abc import Collection

# Names that other programs give to our settings, with the value that the name alone stands for.
_ELSEWHERE = {
    "learning_rate": "lr", "base_lr": "lr", "data": "corpus", "dataset": "data", "train_file": "data",
    "dataset_path": "data", "data_path": "data", "base_model": "model", "model_name_or_path": "model",
    "pretrained_model_name_or_path": "model", "output_dir": "name", "out_dir": "name", "out": "name", "output": "name",
    "run_name": "name", "qlora": "method qlora", "lora": "method lora", "load_in_4bit": "method qlora",
    "full": "method full", "lora_r": "rank", "r": "rank", "lora_rank": "rank", "alpha": "lora_alpha",
    "dropout": "lora_dropout", "lora_target_modules": "target_modules", "num_train_epochs": "epochs",
    "num_epochs": "epochs", "steps": "max_steps", "max_iters": "max_steps", "iters": "max_steps",
    "per_device_train_batch_size": "batch_size", "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum_steps", "grad_accumulation": "grad_accum_steps",
    "max_seq_length": "seq_len", "max_length": "seq_len", "block_size": "seq_len", "cutoff_len": "seq_len",
    "sequence_len": "seq_len", "bf16": "precision bfloat16", "fp32": "precision float32", "dtype": "precision",
    "logging_steps": "log_every", "log_interval": "log_every", "save_steps": "save_every",
    "save_total_limit": "keep_last", "eval_steps": "eval_every", "eval_interval": "eval_every",
    "lr_scheduler_type": "schedule", "lr_scheduler": "schedule", "warmup": "warmup_steps", "optim": "optimizer",
    "max_grad_norm": "grad_clip", "clip_grad": "grad_clip", "gradient_checkpointing": "checkpointing full",
    "torch_compile": "compile", "packing": "batching packed", "val_set_size": "eval_fraction", "n_layer": "num_layers",
    "n_head": "num_heads", "n_embd": "hidden_size", "num_hidden_layers": "num_layers", "use_cpu": "device cpu",
    "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "no_cuda": "device cpu",
    "max_position_embeddings": "max_seq_len", "gradient_clip": "grad_clip", "num_threads": "threads",
}  # fmt: skip


def elsewhere(name: str, known: Collection[str]) -> list[str] | None:
    """Return our name for another program's setting, and the value it stands for, if `known` has that name."""
    ours = _ELSEWHERE.get(name, "").split()
    return ours if ours and ours[0] in known else None
