"""Techniques and diagnostics that plug into any recipe. See :mod:`callbacks.perturbation` for the contract."""
