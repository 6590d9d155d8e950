"""What PEFT has not taken up yet of other libraries, for the tests that run its code."""

import pytest

PREFIXES = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated and will be removed:FutureWarning")
"""Prefix tuning and its kin, with transformers 5.24."""
