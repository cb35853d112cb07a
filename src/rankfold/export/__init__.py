"""Factorized models for tools that know nothing of rankfold."""
