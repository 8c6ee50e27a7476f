"""Numbers that are whole and positive and yet no size of anything are refused by name, wherever they are written."""

import json

import pytest
import torch
from pydantic import ValidationError

from entrenar.cli.main import main
from entrenar.config import FinetuneConfig, RunConfig, options
from entrenar.errors import FormatError
from entrenar.interop.hf import read_config
from entrenar.model import Llama, LlamaConfig
from entrenar.peft import LoraConfig

SIZES = [
    "vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_seq_len", "num_kv_heads",
    "head_dim",
]  # fmt: skip
TABLES = [(RunConfig, "data"), (FinetuneConfig, "sft")]


@pytest.mark.parametrize("value", [10**18, 10**30])
@pytest.mark.parametrize("field", SIZES)
def test_a_size_of_no_model_is_refused_by_name(capsys, field, value):
    """On the command line, before a module is built."""
    assert main(["plan", "--preset", "tiny", f"--{field.replace('_', '-')}", str(value)]) == 2
    assert f"model.{field}: must be less than or equal to" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["batch_size", "seq_len"])
@pytest.mark.parametrize(("kind", "table"), TABLES)
def test_a_batch_that_no_memory_holds_is_refused_by_name(kind, table, field):
    """Rows and their length have a limit in the config of every kind of run."""
    (option,) = [one for one in options(kind) if one.path == (table, field)]
    limit = next(rule.le for rule in option.field.metadata if hasattr(rule, "le"))
    assert limit <= 1 << 31


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 10**18), ("num_hidden_layers", 10**18), ("hidden_size", 10**18), ("vocab_size", 10**18),
     ("rope_theta", 1e300), ("rms_norm_eps", 1e300), ("initializer_range", 1e300)],
)  # fmt: skip
def test_a_config_file_of_no_model_is_refused(tmp_path, key, value):
    """The same limits hold for what Hugging Face's folders say."""
    content = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1,
               "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 4, key: value}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"must be|less than or equal|multiple"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"lora_alpha": 1e300}, {"lora_alpha": float("nan")}, {"rank": 10**18}, {"alpha_pattern": {"q_proj": 1e300}},
     {"alpha_pattern": {"q_proj": float("nan")}}, {"rank_pattern": {"q_proj": 10**18}}],
)  # fmt: skip
def test_a_strength_that_overflows_is_refused(wrong):
    """An update times infinity is NaN after the first step."""
    with pytest.raises(ValidationError, match=r"less than or equal to|must be > 0 and <= 1e\+06|finite"):
        LoraConfig.model_validate(wrong)


def test_the_largest_sizes_that_are_allowed_overflow_nothing():
    """A model of every limit at once can be described: its tensors' sizes are counted, not allocated."""
    largest = LlamaConfig(
        vocab_size=1 << 24, hidden_size=1 << 20, num_layers=1, num_heads=1 << 16, num_kv_heads=1 << 16,
        head_dim=1 << 16, intermediate_size=1 << 20, max_seq_len=1 << 31,
    )  # fmt: skip
    with torch.device("meta"):
        model = Llama(largest)
    assert sum(p.numel() for p in model.parameters()) == largest.parameter_count()
