"""Models: which weights are penalised, and how sparse they are."""
