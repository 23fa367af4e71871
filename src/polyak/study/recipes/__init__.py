"""Recipes: one module for each study. `polyak study list` finds each module whose name does not begin with an underscore."""
