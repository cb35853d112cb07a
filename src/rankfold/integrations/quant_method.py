"""How the configuration of a factorized model calls what opens it. Nothing is imported here."""

QUANT_METHOD = "rankfold"
