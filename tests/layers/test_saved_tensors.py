"""What PaCA layers save for the backward: the selected channels of the input, and nothing else."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from paca_lightning import PaCAConfig, apply_paca
from tests.layers.reference import IN, INDICES, R, layer_and_twin
from tests.tiny import tiny_llama


def saved_tensors(run: Callable[[], Tensor]) -> dict[tuple[int, tuple[int, ...]], Tensor]:
    """What autograd keeps for the backward, each storage and shape once."""
    kept: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr(), tuple(tensor.shape)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return kept


def test_a_layer_saves_r_channels_of_its_input_beside_the_weight() -> None:
    layer, _ = layer_and_twin()
    input = torch.randn(50, IN, requires_grad=True)
    kept = saved_tensors(lambda: layer(input)).values()
    weights = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() == layer.weight.data_ptr()]
    (rest,) = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() != layer.weight.data_ptr()]
    assert len(weights) == 1  # for the gradient of the input: no copy of it
    assert rest.shape == (50, R)
    assert torch.equal(rest, input[:, INDICES])


def activation_bytes(model: LlamaForCausalLM) -> int:
    """Bytes kept for the backward at 2 x 512 tokens, but for parameters."""
    ids = torch.randint(0, 384, (2, 512), generator=torch.Generator().manual_seed(0))
    kept = saved_tensors(lambda: model(inputs_embeds=embedded(model, ids), labels=ids, use_cache=False).loss).values()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for address, size in storages.items() if address not in parameters)


def embedded(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids).detach().requires_grad_()  # every layer must pass a gradient on


def test_a_llama_saves_as_little_as_one_with_frozen_weights_and_far_less_than_lora() -> None:
    # The proportions of hidden 1024 at a quarter: 1024 tokens, r much smaller than a layer's width.
    from peft import LoraConfig, get_peft_model

    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "max_position_embeddings": 512}
    floor, ours = tiny_llama(**shape).bfloat16().requires_grad_(False), tiny_llama(**shape).bfloat16()
    apply_paca(ours, PaCAConfig(r=4))
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = get_peft_model(tiny_llama(**shape).bfloat16(), LoraConfig(r=8, target_modules=projections)).base_model.model
    floor_bytes, our_bytes, lora_bytes = activation_bytes(floor), activation_bytes(ours), activation_bytes(lora)
    assert our_bytes <= 1.02 * floor_bytes
    assert our_bytes <= 0.6 * lora_bytes


def test_norms_that_are_trained_along_save_less_than_frozen_ones() -> None:
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "max_position_embeddings": 512}
    floor, ours = tiny_llama(**shape).bfloat16().requires_grad_(False), tiny_llama(**shape).bfloat16()
    apply_paca(ours, PaCAConfig(r=4, train_norms=True))
    assert activation_bytes(ours) <= 0.9 * activation_bytes(floor)
