"""Training an energy: the recipe, the loop, the run folder and what is done with a finished run."""
