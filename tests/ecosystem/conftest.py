collect_ignore = ["programs"]  # each is run by `python -m tests.ecosystem`, not imported
