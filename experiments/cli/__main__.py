"""`python -m ablab.experiments.cli`: the command line, where `ablab` is not on the path."""

from ablab.experiments.cli.main import main

if __name__ == "__main__":
    main()
