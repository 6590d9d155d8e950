"""What the tests of data share."""

import logging

import pytest


@pytest.fixture(autouse=True)
def heard() -> None:
    """Let Lightning's information through: a traced run of an earlier test has silenced it for the process."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.NOTSET)
