"""Models that rankfold did not make, as sources of losses, and the certificate of two of them."""
