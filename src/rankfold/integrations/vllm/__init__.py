"""Factorized layers inside vLLM, whose layers hold several matrices of a model at once.

``products`` is the mathematics and knows no vLLM; ``layers`` is what vLLM runs. Nothing here is
imported unless vLLM asks: its entry point is ``rankfold.artifact.vllm_plugin``.
"""
