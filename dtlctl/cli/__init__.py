"""The command line: parse, dispatch, print. One file for each group of commands. It may know everything below."""
