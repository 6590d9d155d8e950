"""How many random examples the tests with hypothesis try: 200 in the suite, ``EXAMPLES=10000`` in ``make soak``."""

import os

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("EXAMPLES", "200"))


def examples() -> settings:
    """The same examples each time in the suite, others in each soak; no limit on an example's time."""
    return settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize="EXAMPLES" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
