"""`python -m care_lens.cli`, as `accelerate launch -m` and `torchrun -m` start it."""

from care_lens.cli import main

if __name__ == "__main__":
    main()
