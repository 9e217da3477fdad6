"""`python -m img2vec`, and so `torchrun -m img2vec`."""

from img2vec.cli import main

if __name__ == "__main__":
    main()
