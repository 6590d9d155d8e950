"""Predicting memory."""
