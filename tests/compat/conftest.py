collect_ignore = ["third_party"]  # programs, which tests run and nothing imports
