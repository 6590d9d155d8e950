"""From a model to a converted one and back.

``inventory`` finds a model's structure in one pass, ``targets`` reads a config against it, ``convert`` turns the layers
into PaCA layers, ``scores`` and ``select`` choose columns, ``write_back`` follows an optimizer, ``revert`` goes back,
and ``report`` with ``frozen`` tells what was done. ``state`` is what the converted model knows of all this.
May import ``core`` and ``layers``; never Lightning or transformers.
Limits: works on modules in memory. What is written to files lies in ``adapters``.
"""
