"""Which layers a configuration names, and why the others are left alone."""

import copy
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from paca_lightning import PaCAConfig, PaCAError, apply_paca, paca_layers, unload
from tests.tiny import tiny_llama

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def converted(model: nn.Module, **settings: Any) -> dict[str, int]:
    """Path and rank of each layer that a configuration converts."""
    apply_paca(model, PaCAConfig(**({"r": 2} | settings)))
    return {path: layer.r for path, layer in paca_layers(model)}


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Named(nn.Linear):
    """A subclass that computes what its parent does."""


class Zoo(nn.Module):
    """One of each linear layer that must be left alone, and two that need not."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.named = nn.Linear(8, 8), Named(8, 8)
        self.embedding, self.unembedding = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.unembedding.weight = self.embedding.weight
        self.attention = nn.MultiheadAttention(8, 2)
        self.doubled = Doubled(8, 8)
        self.patched = nn.Linear(8, 8)
        self.patched.forward = lambda input: input  # type: ignore[method-assign]
        self.parametrized = parametrizations.orthogonal(nn.Linear(8, 8))
        with pytest.warns(FutureWarning, match="weight_norm"):
            self.weight_normed = nn.utils.weight_norm(nn.Linear(8, 8))
        self.masked = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)
        self.head = nn.Linear(8, 8)


REASONS = {
    "unembedding": "weight tied to embedding.weight",
    "attention.out_proj": "nn.MultiheadAttention reads its weight without calling it",
    "doubled": "Doubled has a forward of its own",
    "patched": "Linear has a forward of its own",
    "parametrized": "its weight is parametrized",
    "weight_normed": "its weight is parametrized",
    "masked": "its weight has a pruning mask",
}


def test_all_linear_leaves_alone_what_it_must_and_says_why() -> None:
    model = Zoo()
    report = apply_paca(model, PaCAConfig(r=2))
    assert [path for path, _ in paca_layers(model)] == ["plain", "named"]
    assert report.skipped == REASONS | {"head": "output head"}
    assert "Left alone: doubled: Doubled has a forward of its own." in str(report)


@pytest.mark.parametrize("path", REASONS)
def test_naming_such_a_layer_is_refused_with_the_reason(path: str) -> None:
    model = Zoo()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(PaCAError, match=f"^target_modules names '{path}', which cannot be converted: {REASONS[path]}"):
        apply_paca(model, PaCAConfig(r=2, target_modules=["plain", path]))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_an_output_head_is_trained_when_it_is_named() -> None:
    assert converted(Zoo(), target_modules=["head"]) == {"head": 2}
    assert converted(tiny_llama(), target_modules=["lm_head"]) == {"lm_head": 2}


def test_a_tied_output_head_is_refused() -> None:
    with pytest.raises(
        PaCAError, match=r"'lm_head', which cannot be converted: weight tied to model\.embed_tokens\.weight"
    ):
        apply_paca(tiny_llama(tie_word_embeddings=True), PaCAConfig(r=2, target_modules=["lm_head"]))


def test_a_llama_has_seven_targets_a_block() -> None:
    model = tiny_llama()
    found = converted(model)
    assert [path.rpartition(".")[2] for path in found] == 2 * PROJECTIONS
    assert apply_paca(model, PaCAConfig(r=2)).skipped == {"lm_head": "output head"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        (
            ["self_attn.q_proj", "down_proj"],
            [f"{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")],
        ),
        (["layers.1.mlp.up_proj"], ["1.mlp.up_proj"]),
        (r"model\.layers\.1\.self_attn\.(q|v)_proj", ["1.self_attn.q_proj", "1.self_attn.v_proj"]),
        (r".*layers\.0\..*(up|down)_proj", ["0.mlp.up_proj", "0.mlp.down_proj"]),
        ([r".*\.0\.mlp\.up_proj", "k_proj"], ["0.self_attn.k_proj", "0.mlp.up_proj", "1.self_attn.k_proj"]),
    ],
)
def test_names_are_whole_suffixes_and_a_string_is_one_regular_expression(targets: Any, expected: list[str]) -> None:
    assert list(converted(tiny_llama(), target_modules=targets)) == [f"model.layers.{name}" for name in expected]


def test_a_suffix_is_no_substring() -> None:
    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(12)), "xlayers": nn.ModuleList([nn.Linear(4, 4)] * 2)}
    )
    assert list(converted(model, target_modules=["layers.1"])) == ["layers.1"]  # not layers.10, layers.11, xlayers.1


def test_excluded_modules_are_left_alone() -> None:
    model = tiny_llama()
    report = apply_paca(model, PaCAConfig(r=2, exclude_modules=["up_proj", r".*layers\.0\..*"]))
    assert [path for path, _ in paca_layers(model)] == [f"model.layers.1.self_attn.{p}" for p in PROJECTIONS[:4]] + [
        f"model.layers.1.mlp.{p}" for p in ("gate_proj", "down_proj")
    ]
    assert report.skipped["model.layers.1.mlp.up_proj"] == "excluded by exclude_modules"


def test_ranks_and_alphas_by_pattern() -> None:
    model = tiny_llama()
    config = PaCAConfig(
        r=4, alpha=8, rank_pattern={"q_proj": 2, r".*layers\.1\.mlp\..*": 3}, alpha_pattern={"down_proj": 12}
    )
    apply_paca(model, config)
    settings = {path: (layer.r, layer.scaling) for path, layer in paca_layers(model)}
    assert settings["model.layers.0.self_attn.q_proj"] == (2, 8 / 2)
    assert settings["model.layers.0.self_attn.k_proj"] == (4, 8 / 4)
    assert settings["model.layers.0.mlp.down_proj"] == (4, 12 / 4)
    assert settings["model.layers.1.mlp.down_proj"] == (3, 12 / 3)


def test_a_module_reached_by_two_paths_is_converted_once() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"one": shared, "two": nn.Sequential(shared, nn.Linear(8, 8))})
    report = apply_paca(model, PaCAConfig(r=2, target_modules=["two.0", "two.1"]))
    assert [path for path, _ in paca_layers(model)] == ["one", "two.1"]
    assert model["two"][0] is model["one"] is shared
    assert report.trainable_parameters == 2 * 8 * 2


def test_two_layers_that_share_a_weight_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    report = apply_paca(model, PaCAConfig(r=2))
    assert [path for path, _ in paca_layers(model)] == ["2"]
    assert report.skipped == {"0": "weight tied to 1.weight", "1": "weight tied to 0.weight"}


def test_a_parametrized_bias_is_no_reason_to_convert_either() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    parametrize.register_parametrization(model[0], "bias", nn.Identity())
    assert list(converted(model)) == ["1"]


def test_names_count_from_the_hugging_face_model_inside_a_wrapper() -> None:
    wrapper = nn.Module()
    wrapper.net = tiny_llama()
    found = converted(wrapper, target_modules=r"model\.layers\.0\.self_attn\.q_proj")
    assert list(found) == ["net.model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_prj"]},
            r"target_modules: 'q_prj' matched no linear layer; suffixes present: \['down_proj', 'gate_proj', 'k_proj', "
            r"'lm_head', 'o_proj', 'q_proj', 'up_proj', 'v_proj'\]\. Did you mean 'q_proj'\?",
        ),
        ({"target_modules": ["proj"]}, "target_modules: 'proj' matched no linear layer; suffixes present"),
        ({"target_modules": "q_proj"}, "A string is one regular expression of the whole path; pass a list for names"),
        (
            {"exclude_modules": ["dwn_proj"]},
            "exclude_modules: 'dwn_proj' matched no linear layer.*Did you mean 'down_proj'",
        ),
        ({"rank_pattern": {"lm_head": 4}}, "rank_pattern: 'lm_head' matched no linear layer"),
        ({"alpha_pattern": {"x": 4}}, "alpha_pattern: 'x' matched no linear layer"),
        ({"modules_to_save": ["score"]}, "modules_to_save: 'score' matched no module; suffixes present"),
        ({"r": 65}, r"r=65 is more than the 64 input columns of 'model\.layers\.0\.self_attn\.q_proj'\. Lower r"),
        (
            {"rank_pattern": {"down_proj": 97}},
            r"r=97 is more than the 96 input columns of 'model\.layers\.0\.mlp\.down_proj'",
        ),
        ({"exclude_modules": PROJECTIONS}, "matched no linear layer that can be converted"),
    ],
)
def test_a_setting_that_fits_nothing_is_refused_and_changes_nothing(settings: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model)
    with pytest.raises(PaCAError, match=message):
        apply_paca(model, PaCAConfig(**({"r": 2} | settings)))
    assert repr(model) == repr(before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(PaCAError, match="The model has no linear layers, so there is nothing for PaCA to train"):
        apply_paca(nn.Sequential(nn.Conv2d(1, 1, 1)), PaCAConfig())


def test_a_released_subclass_is_itself_again() -> None:
    model = nn.Sequential(Named(4, 4))
    weight = model[0].weight
    apply_paca(model, PaCAConfig(r=2))
    unload(model)
    assert type(model[0]) is Named
    assert model[0].weight is weight
