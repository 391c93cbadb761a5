"""Print the versions of this environment as constraints for pip: `make lock`."""

import json
import subprocess
import sys

words = "-m pip list --format json --exclude-editable --disable-pip-version-check"
command = [sys.executable, *words.split()]
listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
print(
    "# The versions that were tested on Linux; "
    "written by `make lock`, used by `make` as constraints."
)
for package in sorted(json.loads(listed), key=lambda each: each["name"].lower()):
    name, version = package["name"], package["version"].split("+")[0]
    if name not in ("pip", "setuptools", "wheel"):
        # What torch brings for NVIDIA GPUs differs between builds:
        # torch itself names those versions.
        if not name.lower().startswith(("nvidia-", "cuda-", "triton")):
            print(f"{name}=={version}")
