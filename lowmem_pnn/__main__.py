"""`python -m lowmem_pnn`, and the `lowmem-pnn` command."""

from lowmem_pnn.cli.commands import main

if __name__ == "__main__":
    main()
