"""In place of scipy, see sklearn beside it."""
