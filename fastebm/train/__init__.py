"""Training: recipe, loop, run folder, checkpoints."""
