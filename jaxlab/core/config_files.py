"""Where the YAML files that come with the library are."""

from pathlib import Path


def find_config(name: str | Path) -> Path:
    """The file a config's name means: a path, or one relative to the project (`configs/foundation/laptop.yaml`).

    It is looked for in the working folder, the checkout, and the installed package.

    Raises:
      FileNotFoundError: nothing is there; the message lists the configs that come with the library.
    """
    package = Path(__file__).resolve().parent.parent
    roots = (Path.cwd(), package.parent, package)
    for root in roots:
        if (root / name).is_file():
            return root / name
    files = {
        f"configs/{file.relative_to(root / 'configs')}" for root in roots for file in root.glob("configs/*/*.yaml")
    }
    raise FileNotFoundError(f"config {str(name)!r} does not exist; the library's own: {', '.join(sorted(files))}")
