"""Parts of a training loop that previews and averages meet: ranks, wrappers, state, background."""
