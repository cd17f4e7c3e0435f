"""Tables of coefficients fitted to one network: ``fit_table`` and the record of a fit."""
