"""Settings are checked when they are built, and say what is wrong with them."""

from typing import Any

import pytest

from paca_lightning import PaCAConfig, PaCAError


def test_the_defaults_train_16_columns_of_every_linear_layer() -> None:
    config = PaCAConfig()
    assert (config.r, config.alpha, config.target_modules) == (16, None, "all-linear")
    assert (config.selection, config.seed, config.quantize) == ("random", 0, None)


def test_alpha_is_the_layers_own_rank_unless_given() -> None:
    assert PaCAConfig(r=8).alpha_of(None, rank=4) == 4.0  # scaling 1 for every rank
    assert PaCAConfig(r=8, alpha=16).alpha_of(None, rank=4) == 16.0
    assert PaCAConfig(alpha_pattern={"q_proj": 2}).alpha_of("q_proj", rank=4) == 2.0


def test_settings_survive_a_round_trip_through_plain_values() -> None:
    config = PaCAConfig(r=4, alpha=8, target_modules=["q_proj"], rank_pattern={"v_proj": 2}, modules_to_save=["head"])
    assert PaCAConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a positive integer, not 0"),
        ({"r": -1}, "r must be a positive integer, not -1"),
        ({"r": 2.0}, "r must be a positive integer, not 2.0"),
        ({"r": True}, "r must be a positive integer, not True"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] must be a positive integer, not 0"),
        ({"alpha": 0}, "alpha must be a positive number, not 0"),
        ({"alpha": -2.0}, "alpha must be a positive number, not -2.0"),
        ({"alpha": float("nan")}, "alpha must be a positive number, not nan"),
        ({"alpha": float("inf")}, "alpha must be a positive number, not inf"),
        ({"alpha": "16"}, "alpha must be a positive number, not '16'"),
        ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\['q_proj'\] must be a positive number, not 0"),
        ({"selection": "best"}, r"selection='best' is unknown\. Choose one of \['random', 'weight_norm'"),
        ({"quantize": "int3"}, r"quantize='int3' is unknown\. Choose one of \['nf4'\]"),
        ({"selection": "quant_error"}, "needs a quantized base. Set quantize='nf4' or another selection"),
        ({"selection": "output_error"}, "selection='output_error' needs a quantized base"),
        ({"seed": "zero"}, "seed must be an integer, not 'zero'"),
        ({"target_modules": "q_proj("}, r"target_modules='q_proj\(' is not a regular expression: .*unterminated"),
        ({"target_modules": ["q_proj["]}, r"target_modules='q_proj\[' is not a regular expression"),
        ({"exclude_modules": ["*"]}, r"exclude_modules='\*' is not a regular expression"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern='\(' is not a regular expression"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": [""]}, "target_modules holds '', which is not a module name"),
        ({"target_modules": [3]}, "target_modules holds 3, which is not a module name"),
        ({"target_modules": 5}, "target_modules must be a string or a list of names, not 5"),
        ({"exclude_modules": "lm_head"}, r"exclude_modules must be a list of names, such as \['lm_head'\]"),
        ({"modules_to_save": "head"}, r"modules_to_save must be a list of names, such as \['head'\]"),
        ({"exclude_modules": None}, "exclude_modules must be a list of names, not None"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern must map names to values, not \['q_proj'\]"),
        ({"alpha_pattern": None}, "alpha_pattern must map names to values, not None"),
    ],
)
def test_a_value_outside_its_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PaCAError, match=message):
        PaCAConfig(**settings)


def test_an_unknown_setting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PaCAError, match=r"Unknown PaCA settings \['rank'\]. Known: .*'r', 'rank_pattern'"):
        PaCAConfig.from_dict({"rank": 8})
