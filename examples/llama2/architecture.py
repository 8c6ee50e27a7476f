"""A guided reading of the LLaMA: follow four tokens from ids to loss and gradients, with the shape after each part.

    python examples/llama2/architecture.py [--preset tiny]

B is the batch, T time, D the width, H query heads, G key and value heads, K the width of a head, F the hidden width of
the MLP, V the vocabulary. The model itself is `src/entrenar/model/llama.py`; the derivatives are in `src/entrenar/ops`.
"""

import argparse

import torch

import entrenar
from entrenar.model import Llama


def show(part: str, tensor: torch.Tensor, letters: str, reason: str) -> torch.Tensor:
    """Print a tensor's shape next to the letters of its axes."""
    print(f"{part:<22}{tuple(tensor.shape)!s:<18}{letters:<10}{reason}")
    return tensor


def read_attention(model: Llama, x: torch.Tensor) -> None:
    """Show the projections of the first block's attention and their heads."""
    attention, config = model.model.layers[0].self_attn, model.config
    heads = (*x.shape[:2], -1, config.head_width)
    show("q_proj", attention.q_proj(x).view(heads).transpose(1, 2), "B H T K", "a query for each head and token")
    keys = show("k_proj", attention.k_proj(x).view(heads).transpose(1, 2), "B G T K", "fewer heads: queries share keys")
    show("v_proj", attention.v_proj(x).view(heads).transpose(1, 2), "B G T K", "and values")
    print(f"{'rope':<22}{tuple(keys.shape)!s:<18}{'':<10}turns each pair of a head's numbers by the token's position")


@torch.no_grad()
def read_forward(model: Llama, ids: torch.Tensor) -> None:
    """Walk through the embedding, one block and the head."""
    show("input ids", ids, "B T", "")
    x = show("embed_tokens", model.model.embed_tokens(ids), "B T D", "a row of the embedding for each id")
    block = model.model.layers[0]
    normed = show("input_layernorm", block.input_layernorm(x), "B T D", "RMSNorm: divides by the root mean square")
    read_attention(model, normed)
    inner = block.mlp.gate_proj(normed)
    show("gate_proj, up_proj", inner, "B T F", "SwiGLU: silu(gate) times up")
    show("down_proj", block.mlp.down_proj(inner), "B T D", "added to the residual, as attention's output is")
    show("logits", model(ids), "B T V", f"after {model.config.num_layers} blocks, a last norm and the head")


def read_gradients(model: Llama, ids: torch.Tensor) -> None:
    """Take the loss of predicting each next token, and show where its gradient goes."""
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    targets = ids[:, 1:].numel()
    uniform = torch.log(torch.tensor(float(model.config.vocab_size)))
    print(f"\nloss {float(loss.detach()) / targets:.3f} nats a token; uniform guessing has {float(uniform):.3f}")
    for name, parameter in model.model.layers[0].named_parameters():
        norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
        print(f"  layers.0.{name:<34}{tuple(parameter.shape)!s:<14}gradient norm {norm:.2e}")


def main() -> None:
    """Build a model of random weights and read it from front to back."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--preset", default="tiny")
    config = entrenar.LlamaConfig.preset(arguments.parse_args().preset)
    model, generator = Llama(config), torch.Generator().manual_seed(0)
    model.init_weights(generator)
    print(f"{config.parameter_count():,} parameters\n")
    ids = torch.randint(config.vocab_size, (1, 4), generator=generator)
    read_forward(model, ids)
    read_gradients(model, ids)


if __name__ == "__main__":
    main()
