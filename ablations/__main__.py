"""`python -m ablations` is `expertgrid`."""

from ablations.cli.entry import main

if __name__ == "__main__":
    main()
