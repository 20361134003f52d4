"""The command ``srigl-fx``.

Owns the entry point alone: without the packages of the extra ``[cli]`` it says how to get them. It must not know any
command.
"""

import sys

CLI_PACKAGES = {"typer", "rich", "click"}


def main() -> None:
    """Run the command line; exit status 2 where the extra ``[cli]`` is missing."""
    try:
        from srigl_fx.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in CLI_PACKAGES:
            raise
        sys.exit(_usage_error(f"The command line needs {error.name}: pip install 'srigl-fx[cli]'"))
    app(prog_name="srigl-fx")


def _usage_error(message: str) -> int:
    sys.stderr.write(message + "\n")
    return 2
