"""Methods beside PaCA: those of PEFT, and small reference modules of methods that PEFT lacks.

What a callback needs of any of them is :class:`~paca_lightning.other_methods.adapted.AdaptedModel`.
"""
