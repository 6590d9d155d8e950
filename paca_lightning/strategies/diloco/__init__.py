"""DiLoCo (arXiv 2311.08105): replicas that train on their own and exchange their changes every few steps.

``strategy.py`` is the Lightning strategy, ``outer.py`` its outer optimizer on torchft, ``group.py`` the connection
between replicas. Needs the extra ``diloco``.
"""
