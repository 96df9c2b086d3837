"""Many runs of one recipe: grids of keys, and losses at one price. Only the command line knows it."""
