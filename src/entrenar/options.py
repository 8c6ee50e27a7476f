"""The keyword options of the library, for type checkers and editors; written by `benchmarks/option_types.py`.

Each is an option of the config models of the same name, whose docstrings say what it does.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

AnyPath = str | Path


class TrainingOptions(TypedDict, total=False):
    """Options of every training run."""

    name: str
    runs_dir: AnyPath
    device: Literal["auto", "cpu", "cuda"]
    compute_dtype: Literal["auto", "float32", "bfloat16"]
    batch_size: int
    seq_len: int
    max_steps: int | None
    epochs: float | None
    max_time_s: float | None
    grace_s: float | None
    rank_timeout_s: float
    grad_accum_steps: int
    eval_every: int
    early_stop_patience: int | None
    log_every: int
    tensorboard: bool
    trackers: Sequence[Literal["trackio", "wandb", "mlflow"]]
    seed: int
    precision: Literal["float32", "bfloat16"]
    compile: bool
    checkpointing: Literal["none", "selective", "full"]
    stream_base: bool
    offload: Literal["none", "host", "disk"]
    offload_dir: AnyPath | None
    offload_budget_gb: float
    freed_memory: Literal["keep", "return"]
    threads: int | None
    optimizer: Literal["adamw", "adamw8bit", "muon"]
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    grad_clip: float
    muon_momentum: float
    muon_dtype: Literal["auto", "bfloat16", "float32"]
    muon_excluded: str | Sequence[str]
    schedule: Literal["cosine", "linear", "constant", "wsd"]
    warmup_steps: int
    min_lr_ratio: float
    wsd_decay_ratio: float
    save_every: int
    keep_last: int
    keep_best: bool
    halt_on: Sequence[
        Literal["loss_spike", "gradient_spike", "dead_gradient", "plateau", "throughput_drop", "held_out_rise"]
    ]
    skip_on: Sequence[Literal["loss_spike", "gradient_spike", "dead_gradient"]]
    lower_lr_on: Sequence[
        Literal["loss_spike", "gradient_spike", "dead_gradient", "plateau", "throughput_drop", "held_out_rise"]
    ]
    lower_lr_by: float
    rewind_on: Sequence[Literal["non_finite", "loss_spike", "gradient_spike", "dead_gradient", "held_out_rise"]]
    max_rewinds: int
    max_skipped_steps: int
    monitor_window: int
    spike_z: float
    plateau_steps: int
    plateau_min_drop: float
    dead_gradient_norm: float
    dead_gradient_steps: int
    throughput_drop: float
    throughput_drop_steps: int
    held_out_rise: float
    shard: Literal["auto", "none", "full", "hybrid"]
    shard_size: int | None


class PretrainOptions(TrainingOptions, total=False):
    """Options of `entrenar.pretrain`."""

    preset: Literal["tiny", "124m", "1b", "7b", "llama3-8b"] | None
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_seq_len: int
    num_kv_heads: int | None
    head_dim: int | None
    rope_theta: float
    rope_scaling: Any | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    initializer_range: float
    bos_token_id: int | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    corpus: AnyPath | Sequence[AnyPath]
    weights: Sequence[float] | None
    sources: str | Sequence[str]
    tokenizer: AnyPath | None
    mask_documents: bool
    max_eval_batches: int | None


class FinetuneOptions(TrainingOptions, total=False):
    """Options of `entrenar.finetune`."""

    model: AnyPath
    method: Literal["full", "lora", "qlora"]
    data: AnyPath | Sequence[AnyPath]
    eval_data: AnyPath | Sequence[AnyPath]
    eval_fraction: float
    columns: str | Sequence[str]
    ignore_fields: str | Sequence[str]
    prompt_template: str | None
    completion_template: str | None
    prompt_format: Literal["auto", "chat", "alpaca", "plain"]
    template_date: str | None
    train_on: Literal["answers", "last", "all"]
    long_rows: Literal["drop", "cut", "stop"]
    bad_rows: Literal["stop", "quarantine"]
    batching: Literal["packed", "grouped", "padded"]
    max_eval_examples: int | None
    rank: int
    lora_alpha: float
    lora_dropout: float
    target_modules: str | Sequence[str]
    layers: Literal["all"] | str | Sequence[int]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_init: Literal["default", "gaussian", "pissa", "loftq"]
    lora_plus_ratio: float
    modules_to_save: str | Sequence[str]
    embedding: Literal["keep", "int8", "nf4"]
    head: Literal["keep", "int8", "nf4"] | None
    bits: float | None
    calibration: AnyPath | None
    loftq_turns: int
    cache_trunk: bool
    trunk_dir: AnyPath
    trunk_rows: Literal["float32", "bfloat16", "int8"]
    trunk_budget_gb: float
    trunk_checks: int
    task_data: AnyPath | None
    metric: Literal["exact_match", "accuracy"]
    max_task_examples: int
    sample_answers: int
    max_answer_tokens: int


class PlanOptions(PretrainOptions, FinetuneOptions, total=False):
    """Options of `entrenar.plan`."""


class GenerateOptions(TypedDict, total=False):
    """Options of `entrenar.generate`."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    decode: Literal["auto", "exact"]
    stop: str | Sequence[str]
    allow_special: bool
    eos_token_ids: Sequence[int] | None
