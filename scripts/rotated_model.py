"""A Llama that computes as before, with its residual stream in another basis: one rotation for the whole model.

What reads from the residual stream has directions of that basis as input columns then, so PaCA trains these, and the
rotation costs nothing in a step (QuaRot, arXiv 2404.00456; SliceGPT, arXiv 2401.15024). Norms are folded into the
linear layers behind them first, and the head is untied from the embedding.

    python -m scripts.rotated_model models/SmolLM2-135M-Instruct configs/study/gsm8k.yaml models/rotated

The basis is that of the principal directions of what the layers read on the first training batches of the config, the
largest first, or a random one. docs/learning.md has what PaCA learned on such models.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from paca_lightning.core.files import written_aside
from paca_lightning.tools.compare.task import read_task
from scripts.first_batches import first_training_batches


def readers(model: LlamaForCausalLM) -> Iterator[tuple[nn.Module, list[nn.Linear]]]:
    """Each norm of the residual stream, with the linear layers that read what it gives."""
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        yield block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]
        yield block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]
    yield model.model.norm, [model.lm_head]


def writers(model: LlamaForCausalLM) -> Iterator[nn.Linear]:
    """The linear layers that write to the residual stream."""
    for block in model.model.layers:
        yield from (block.self_attn.o_proj, block.mlp.down_proj)


@torch.no_grad()
def fold_norms(model: LlamaForCausalLM) -> None:
    """Move the weights of all norms into the layers behind them, but for their rms. Norms and rotations commute then.

    The rms stays so that layers read inputs as large as before, and the learning rate that suits their columns is the
    same.
    """
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    for norm, layers in readers(model):
        rms = norm.weight.square().mean().sqrt()
        for layer in layers:
            layer.weight.mul_(norm.weight / rms)
        norm.weight.fill_(rms)


@torch.no_grad()
def rotate(model: LlamaForCausalLM, basis: Tensor) -> None:
    """Turn the residual stream h to ``h basis``; the transposed basis turns it back.

    Args:
        model: With folded norms and layers without biases.
        basis: Orthogonal, shape (hidden_size, hidden_size). Its columns are the directions that layers read then.
    """
    embedding = model.get_input_embeddings()
    for weight in (embedding.weight, *(layer.weight for _, layers in readers(model) for layer in layers)):
        weight.copy_(weight @ basis)
    for layer in writers(model):
        layer.weight.copy_(basis.T @ layer.weight)


@torch.no_grad()
def principal_directions(model: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> Tensor:
    """Eigenvectors of the second moments of what all layers read, as columns, those of the largest moment first.

    Args:
        model: With folded norms.
        batches: What ``model`` takes; padding counts as other tokens do.
    """
    moment = torch.zeros(model.config.hidden_size, model.config.hidden_size, dtype=model.dtype)

    def watch(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        tokens = output.flatten(0, -2)
        moment.add_(tokens.T @ tokens)

    handles = [norm.register_forward_hook(watch) for norm, _ in list(readers(model))[:-1]]
    try:
        for batch in batches:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return torch.linalg.eigh(moment).eigenvectors.flip(-1)


def random_directions(size: int, seed: int) -> Tensor:
    """An orthogonal matrix, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def main() -> None:
    """Write the model with its tokenizer. The directory appears only when it is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--basis", choices=("principal", "random"), default="principal")
    parser.add_argument("--seed", type=int, default=0, help="of the random basis")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float64).eval()
    fold_norms(model)
    if arguments.basis == "principal":
        task = read_task([f"--config={arguments.config}"], arguments.config.stem, None, "rotated_model")
        basis = principal_directions(model, first_training_batches(task))
    else:
        basis = random_directions(model.config.hidden_size, arguments.seed)
    rotate(model, basis)
    with written_aside(arguments.output) as scratch:
        model.to(torch.bfloat16).save_pretrained(scratch)
        AutoTokenizer.from_pretrained(arguments.model).save_pretrained(scratch)


if __name__ == "__main__":
    main()
