"""Whether a run validates before it ends."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from paca_lightning.callbacks.monitors import without_validation

EPOCH_OF_TEN: dict[str, Any] = {
    "global_step": 0,
    "enable_validation": True,
    "num_val_batches": [3],
    "num_training_batches": 10,
    "val_check_batch": 10,
    "max_steps": -1,
    "max_epochs": 1,
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
}


def found(**changed: Any) -> str | None:
    return without_validation(SimpleNamespace(**(EPOCH_OF_TEN | changed)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "first"),
    [
        ({"max_steps": 9}, 10),
        ({"check_val_every_n_epoch": 2}, 20),
        ({"check_val_every_n_epoch": None, "val_check_batch": 15}, 15),
        ({"num_training_batches": math.inf, "val_check_batch": 50, "max_steps": 20}, 50),
    ],
)
def test_a_run_that_ends_before_its_first_validation(changed: dict[str, Any], first: int) -> None:
    assert (found(**changed) or "").endswith(f"its first validation comes after {first}")


@pytest.mark.parametrize("changed", [{"num_val_batches": [0]}, {"num_val_batches": []}, {"enable_validation": False}])
def test_a_run_without_validation_data(changed: dict[str, Any]) -> None:
    assert found(**changed) == "the run has no validation data"


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"max_steps": 5, "accumulate_grad_batches": 2},
        {"check_val_every_n_epoch": 2, "max_epochs": 2},
        {"check_val_every_n_epoch": None, "val_check_batch": 15, "max_epochs": 2},
        {"max_epochs": -1},
        {"max_epochs": None},
        {"num_training_batches": math.inf, "val_check_batch": 5, "max_steps": 40},
        {"val_check_batch": None, "max_steps": 1},  # by the clock
        {"val_check_batch": math.inf, "max_steps": 1},  # at the end of an epoch of unknown length
        {"global_step": 100, "max_steps": 1},  # resumed
    ],
)
def test_a_run_that_validates_or_of_which_it_is_not_known(changed: dict[str, Any]) -> None:
    assert found(**changed) is None
