"""Wheels carry configs/ and slurm/ inside the package rl; an editable install reads them from the checkout."""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == "editable":
            return
        root = Path(self.root)
        for folder in ("configs", "slurm"):
            for file in sorted((root / folder).rglob("*")):
                relative = file.relative_to(root / folder)
                # configs/local holds the facts of one site: never part of a package
                if file.is_file() and relative.parts[0] != "local":
                    build_data["force_include"][str(file)] = f"rl/_{folder}/{relative}"
