"""`python -m motley_client` is the `motley` command."""

from motley_client.cli import main

if __name__ == "__main__":
    main()
