"""``paca-lightning eval``: lm-eval's tasks on a base model and its adapters, side by side.

lm-eval (an extra) has the tasks, the prompts and the metrics. ``harness`` asks it to measure a model in memory,
``results`` puts base and adapters beside each other.
"""
