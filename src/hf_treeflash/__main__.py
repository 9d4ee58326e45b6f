"""Entry of the command line: `hf-treeflash`, or `python -m hf_treeflash`."""

import importlib.util
import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    if missing := [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]:
        print(f"The command line needs {' and '.join(missing)}: pip install 'hf-treeflash[cli]'", file=sys.stderr)
        sys.exit(2)
    from .cli import app

    app(prog_name="hf-treeflash")


if __name__ == "__main__":
    main()
