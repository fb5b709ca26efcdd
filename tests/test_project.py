"""What an installation gets: every package, the embedded model, one version."""

from importlib import metadata
from pathlib import Path

import edgeinfer.models

import edgeinfer

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings tomli
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_installed():
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "edgeinfer").rglob("__init__.py")]
    packages = {".".join(folder.parts) for folder in folders} | {"edgeinfer.models", "edgeinfer.exporters"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages


def test_embedded_model_is_where_the_package_says():
    path = edgeinfer.models.default_model_path()
    assert path == ROOT / "models" / "story.gguf"
    assert path.with_suffix(".md").exists() and path.stat().st_size <= 8_000_000


def test_one_version():
    assert metadata.version("edgeinfer") == edgeinfer.__version__ == PROJECT["project"]["version"]
