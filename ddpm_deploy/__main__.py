"""`python -m ddpm_deploy`, for launchers that start modules, such as torchrun."""

from __future__ import annotations

from ddpm_deploy.cli.app import main

if __name__ == "__main__":
    main()
