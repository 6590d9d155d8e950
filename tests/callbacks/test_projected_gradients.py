"""ProjectedGradients: groups for GaLore's and APOLLO's optimizers, equal to hand-made ones, resumed bitwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from paca_lightning import PaCAConfig, PaCAError, PaCAStrategy, ProjectedGradients
from paca_lightning.other_methods.projected import split_group
from tests.callbacks.test_peft_strategy import TOKENS, Module, fit, loss_of, same, trained
from tests.tiny import tiny_llama

RANK, GAP = 8, 7
SETTINGS: dict[str, dict[str, Any]] = {
    "galore": {"scale": 0.25, "proj_type": "std"},
    "galore-right": {"scale": 0.5, "proj_type": "right"},
    "apollo": {"scale": 1.0, "proj_type": "std", "proj": "random", "scale_type": "channel"},
    "apollo-mini": {"scale": 128.0, "proj_type": "std", "proj": "svd", "scale_type": "tensor"},
}
every_optimizer = pytest.mark.parametrize("name", SETTINGS)


def optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    if name.startswith("galore"):
        galore = pytest.importorskip("galore_torch", reason="galore-torch is not installed")
        return lambda parameters: galore.GaLoreAdamW(parameters, lr=1e-2, no_deprecation_warning=True)
    apollo = pytest.importorskip("apollo_torch", reason="apollo-torch is not installed")
    return lambda parameters: apollo.APOLLOAdamW(parameters, lr=1e-2)


class Projected(Module):
    """Trains all of a tiny Llama with a schedule over an optimizer's groups."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.optimizer_class = optimizer_class(name)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_class(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]


def callback(name: str) -> ProjectedGradients:
    return ProjectedGradients(RANK, update_proj_gap=GAP, settings=SETTINGS[name])


def by_hand(name: str) -> Any:
    """Twenty steps of the package's optimizer in a plain loop, with groups made by hand."""
    L.seed_everything(0, verbose=False)
    model = tiny_llama()
    projected = [p for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    others = [p for n, p in model.named_parameters() if not n.endswith("_proj.weight")]
    settings = {"rank": RANK, "update_proj_gap": GAP} | SETTINGS[name]
    optimizer = optimizer_class(name)([{"params": others}, {"params": projected} | settings])
    for epoch in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.8**epoch
        for batch in TOKENS.split(4):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@every_optimizer
def test_equal_to_groups_made_by_hand_and_resumed_bitwise(name: str, tmp_path: Path) -> None:
    whole = Projected(name)
    each = ModelCheckpoint(tmp_path, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    trainer = fit(whole, tmp_path, callback(name), each)
    groups = trainer.optimizers[0].param_groups
    assert [len(group["params"]) for group in groups] == [7, 14]  # embeddings, head, norms; linear layers
    assert groups[0]["lr"] == groups[1]["lr"] < 1e-2
    expected = dict(by_hand(name).named_parameters())
    for path, value in trained(whole.model).items():
        torch.testing.assert_close(value, expected[path], rtol=1e-6, atol=1e-7)  # the schedules round differently

    saved = torch.load(tmp_path / "0.ckpt", weights_only=True)
    projector = saved["optimizer_states"][0]["state"][10]["projector"]
    assert min(projector["ortho_matrix"].shape) == RANK
    resumed = Projected(name)
    # From step 10, with the directions of step 7; at step 14 they are chosen again.
    fit(resumed, tmp_path, callback(name), ckpt_path=tmp_path / "0.ckpt")
    assert same(trained(whole), trained(resumed))


def test_the_optimizer_is_left_as_it_was(tmp_path: Path) -> None:
    before = torch.optim.Optimizer.add_param_group
    fit(Projected("galore"), tmp_path, callback("galore"), max_steps=1)
    assert torch.optim.Optimizer.add_param_group is before

    class Broken(Projected):
        def configure_optimizers(self) -> Any:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fit(Broken("galore"), tmp_path, callback("galore"), max_steps=1)
    assert torch.optim.Optimizer.add_param_group is before


def test_a_group_with_a_rank_of_its_own_stays_as_it_is() -> None:
    weights = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(3)]
    own = {"params": weights, "rank": 2}
    assert split_group(own, weights, {"rank": 3}) == [own]
    plain, projected = split_group({"params": weights, "lr": 1.0}, weights[1:], {"rank": 3})
    assert plain == {"params": weights[:1], "lr": 1.0}
    assert projected == {"params": weights[1:], "lr": 1.0, "rank": 3}
    named = [("a", weights[0]), ("b", weights[1])]
    assert split_group({"params": named}, weights[:1], {"rank": 3})[1] == {"params": named[:1], "rank": 3}


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda: [ProjectedGradients(8)], r"torch.optim.adamw.AdamW projects nothing. Let .* galore_torch.GaLoreAdamW"),
        (lambda: [ProjectedGradients(64)], "None of 14 linear layers has a trained weight larger than rank 64"),
        (lambda: [ProjectedGradients(8), PaCAStrategy(PaCAConfig(r=2))], "PaCAStrategy freezes them"),
        (lambda: [ProjectedGradients(0)], "rank=0"),
    ],
)
def test_mistakes_are_named_before_training(callbacks: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=message):
        fit(Module(), tmp_path, *callbacks())


def test_sharding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match="FSDP2Strategy shards weights"):
        fit(Module(), tmp_path, ProjectedGradients(8), strategy="paca_fsdp2")
