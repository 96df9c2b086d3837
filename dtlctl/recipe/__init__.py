"""What an experiment is, as data: schema, loading, plan, demands. It opens and trains nothing."""
