"""The pages' Python blocks run, what they name exists, and every public name says what it does."""

import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastrnn
from fastrnn import nn, ops, plot, reference, search

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name)
def test_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, namespace = page.read_text(), {"__name__": "__main__"}
    for block in PYTHON.finditer(text):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], page, "exec"), namespace)  # so that errors name the page's own line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_names_exists(page: Path) -> None:
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    files = re.findall(r"\bpython (\w\S*\.py)", text)
    modules = re.findall(r"\bpython -m (fastrnn[\w.]*|bench[\w.]*)", text)
    targets = re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, re.MULTILINE)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [file for file in files if not (ROOT / file).exists()]
    missing += [module for module in modules if importlib.util.find_spec(module) is None]
    missing += [f"make {target}" for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)]
    assert not missing


def public_names() -> Iterator[tuple[str, Any]]:
    """Public classes and functions, and what is ours of the classes' public methods."""
    for module in (fastrnn, nn, ops, search, reference):
        for public in module.__all__:
            found = getattr(module, public)
            if inspect.isclass(found) or inspect.isfunction(found):
                yield f"{module.__name__}.{public}", found
            for base in inspect.getmro(found) if inspect.isclass(found) else ():
                for method in vars(base) if base.__module__.startswith("fastrnn") else ():
                    if inspect.isfunction(getattr(found, method)) and method[0] != "_" and method != "extra_repr":
                        yield f"{module.__name__}.{public}.{method}", getattr(found, method)
    yield "fastrnn.plot.alignment", plot.alignment


@pytest.mark.parametrize("public", dict(public_names()))
def test_docstrings_name_every_tensor_and_its_shape(public: str) -> None:
    found = dict(public_names())[public]
    text = inspect.getdoc(found)
    assert text and not re.search(r"^ *\[[^]]*\]:", text, re.MULTILINE)  # Markdown would take it for a link's address
    # Of a tensor that another docstring describes, "as" says which; the reference has shapes beside its arguments.
    if inspect.isfunction(found) and not re.search(r"\b[Aa]s (:\w+:|in |torch)", text) and "reference" not in public:
        tensors = [name for name, kind in found.__annotations__.items() if "Tensor" in str(kind) and name != "return"]
        assert [name for name in tensors if not re.search(rf"\b{name}\b", text)] == []
        assert "[" in text or not tensors


def test_api_reference(tmp_path: Path) -> None:
    recipe = re.search(r"^docs:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    command = recipe.replace("$(PY)", sys.executable).replace("build/docs", str(tmp_path))
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for public, _ in public_names():
        module, name = re.fullmatch(r"(fastrnn(?:\.[a-z]+(?=\.))?)\.(.*)", public).groups()
        page = (tmp_path / (module.replace(".", "/") + ".html")).read_text()
        assert f'id="{name}"' in page, public
        assert 'id="_' not in page and "<em>" not in page  # two asterisks of a formula are no emphasis
