"""Recipes: one module a study. `polyak study list` finds each module whose name has no underscore in front."""
