"""`python -m longlora_cli`, which is also what `accelerate launch -m longlora_cli` starts."""

from longlora_cli.cli import main

if __name__ == "__main__":
    main()
