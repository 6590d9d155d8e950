"""MMLU (Hendrycks et al., 2021, arXiv 2009.03300): its data for training, and its evaluation as a callback."""
