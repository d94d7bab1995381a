"""Training: a loop for any model, and the recipe of the built-in voice."""
