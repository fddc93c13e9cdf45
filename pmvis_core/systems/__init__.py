"""Recipes, one a paper: this model, these samples, this matcher, these losses."""
