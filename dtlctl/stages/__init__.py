"""The stages, each a function of a run and a job in a file that tells its story; their runner. They know no report."""
