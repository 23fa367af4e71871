"""Build the documentation site from the Markdown of the repository: `make docs`.

    python tools/site/build.py FOLDER      FOLDER/site/index.html opens without a server

The pages keep their places, so a link in them leads to the same file on the site. `FOLDER` is made anew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
PAGES = ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")
FOLDERS = ("docs", "examples", "benchmarks/results")
WITH_BASES = ("polyak.averager",)  # the methods of its class lie in several internal modules
NOT_OF_THE_API = ("polyak.__main__", "polyak.cli")  # docs/cli.md is the page of the command line


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    gather(out)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    sources = {**os.environ, "PYTHONPATH": str(ROOT / "src")}  # not an installed polyak
    subprocess.run(command, cwd=out, env=sources, check=True)
    (out / "site/404.html").unlink()  # a page for servers, with links from their root
    print(f"{out}/site/index.html")


def gather(out: Path) -> None:
    """The folder that Zensical builds: settings, theme, pages, and a page for each public module."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(HERE, out, ignore=shutil.ignore_patterns("build.py", "__pycache__"))
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, out / "pages" / folder)
    for page in PAGES:
        shutil.copy(ROOT / page, out / "pages")
    (out / "pages/api").mkdir()
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    api = {module: f"api/{module.removeprefix('polyak.')}.md" for module in public_modules()}
    settings["nav"].append({"API": [{module: page} for module, page in api.items()]})
    (out / "mkdocs.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    for module, page in api.items():
        options = "    options:\n      inherited_members: true\n" if module in WITH_BASES else ""
        (out / "pages" / page).write_text(f"# {module}\n\n::: {module}\n{options}")


def public_modules() -> list[str]:
    """The modules below `polyak` whose names have no part that begins with an underscore."""
    source = ROOT / "src"
    files = [path.relative_to(source).with_suffix("") for path in source.rglob("*.py")]
    names = {".".join(file.parts).removesuffix(".__init__") for file in files}
    # Recipes are found by name, as data: `polyak study list` shows them.
    api = {n for n in names if "._" not in n and not n.startswith("polyak.study.recipes")}
    return sorted(api - {"polyak", *NOT_OF_THE_API})


if __name__ == "__main__":
    main()
