"""Tables of few steps, fitted to the model that trains."""
