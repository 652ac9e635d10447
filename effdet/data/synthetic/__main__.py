"""`python -m effdet.data.synthetic`."""

from .dataset import main

if __name__ == "__main__":
    main()
