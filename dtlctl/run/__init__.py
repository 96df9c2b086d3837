"""One run of a recipe: its folder and keys, its datasets, its models in training. It knows no stage."""
