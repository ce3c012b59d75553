"""The documents: links that lead somewhere, examples that run, a page for each error; and the checks themselves."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tomllib

import pytest

from nnsight_go import errors

ROOT = pathlib.Path(__file__).parents[1]
TOOLS = ROOT / "tools" / "build"

sys.path.insert(0, str(TOOLS))
import docs  # noqa: E402  (the tools are scripts, found by their directory)
import pages  # noqa: E402
import snippets  # noqa: E402

sys.path.remove(str(TOOLS))  # a venv.py lies there, which is not Python's


def page(folder: pathlib.Path, text: str, name: str = "README.md") -> pages.Page:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return pages.read(path)


# ---- this repository ----


def test_links() -> None:
    found = [pages.read(path) for path in pages.find(ROOT)]
    assert {"README.md", "CONTRIBUTING.md", "docs/contract.md"} <= {str(p.path.relative_to(ROOT)) for p in found}
    assert [wrong for p in found for wrong in docs.links(p, ROOT)] + docs.unreachable(found, ROOT) == []


@pytest.mark.slow
def test_examples() -> None:
    """In a process of their own: pages leave models open, and one of them forks."""
    done = subprocess.run([sys.executable, TOOLS / "docs.py"], capture_output=True, text=True, cwd=ROOT)
    print(done.stdout)
    assert done.returncode == 0, done.stderr


def test_every_error_has_a_page() -> None:
    folder = ROOT / "docs" / "errors"
    index = (folder / "README.md").read_text()
    classes = {*errors.CLASSES, "ForkError"}
    assert classes == {p.stem for p in folder.glob("*.md")} - {"README"}
    for name in classes:
        cls = getattr(errors, name)
        base = next(b.__name__ for b in cls.__mro__ if b.__module__ == "builtins")
        row = f"| [{name}]({name}.md) | `{base}` |"
        assert row in index, name


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    for number, path in enumerate(sorted(folder.glob("0*.md")), start=1):
        title = path.read_text().splitlines()[0]
        assert path.name.startswith(f"{number:04d}-")
        assert f"| [{number}]({path.name}) | {title.removeprefix(f'# {number}. ')} |" in index


def test_ci_runs_what_the_documents_say() -> None:
    ci = ROOT / ".ci" / "run"
    assert ci.stat().st_mode & 0o111
    commands = [line.split(" ||")[0] for line in ci.read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make lint", "make test"]


def test_licence_is_the_one_the_package_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "LICENSE").read_text()
    assert project["license"] == "MIT" and text.startswith("MIT License\n")
    assert project["authors"][0]["name"] in text


# ---- the checks ----


def test_links_that_lead_nowhere(tmp_path: pathlib.Path) -> None:
    other = page(tmp_path, "# A `code` heading, twice\n\n## B\n\n## B\n", "docs/other.md")
    assert other.anchors == {"a-code-heading-twice", "b", "b-1"}
    good = "[a](docs/other.md#b-1) ![b](docs/other.md) [c](docs/) [d](https://x.org/y) [e](#own)\n\n# Own\n"
    assert docs.links(page(tmp_path, good), tmp_path) == []
    for target, why in {
        "docs/gone.md": "does not exist",
        "docs/other.md#c": "has no such heading",
        "#gone": "has no such heading",
        "../outside.md": "leads out of the repository",
        "/docs/other.md": "leads out of the repository",
    }.items():
        for form in ("[x]({})", "![x]({})", '[x]({} "t")', "[x]: {}", '<img src="{}">', "[![x](docs/other.md)]({})"):
            wrong = docs.links(page(tmp_path, "\n" + form.format(target)), tmp_path)
            assert wrong == [f"README.md:2: {target} {why}"], form


def test_links_in_code_are_none(tmp_path: pathlib.Path) -> None:
    text = "`[x](gone.md)`\n\n```\n[x](gone.md)\n```\n\n~~~~ text\n```\n[x](gone.md)\n~~~~\n"
    assert docs.links(page(tmp_path, text), tmp_path) == []


def test_pages_nobody_links_to(tmp_path: pathlib.Path) -> None:
    found = [
        page(tmp_path, "[a](docs/a.md)"),
        page(tmp_path, "[b](b.md#x)", "docs/a.md"),
        page(tmp_path, "# X\n", "docs/b.md"),
        page(tmp_path, "", "docs/c.md"),
    ]
    assert docs.unreachable(found, tmp_path) == ["docs/c.md:1: no links lead here from README.md"]


def test_hidden_and_built_folders_hold_no_pages(tmp_path: pathlib.Path) -> None:
    for name in ("a.md", "docs/b.md", "docs/build/c.md", ".venv/d.md", "build/e.md", "dist/f.md"):
        page(tmp_path, "", name)
    assert [str(p.relative_to(tmp_path)) for p in pages.find(tmp_path)] == ["a.md", "docs/b.md", "docs/build/c.md"]


def test_examples_share_a_page(tmp_path: pathlib.Path) -> None:
    text = """
<!-- python
x = 20
-->

```python
def double(n):
    return 2 * n
```

```python no-run
x = 1 / 0
```

* In a list:

  ```python
  for _ in range(2):
      print(double(x) + 2,  "and more")
  ```

  ```text
  42 and ...
  42 and more
  ```
"""
    assert snippets.run(page(tmp_path, text), tmp_path) == 3


def test_examples_run_in_an_empty_folder(tmp_path: pathlib.Path) -> None:
    text = "```python\nimport os\nassert os.listdir() == []\nopen('x', 'w').close()\n```\n"
    here = pathlib.Path.cwd()
    assert snippets.run(page(tmp_path, text), tmp_path) == 1
    assert pathlib.Path.cwd() == here and not (here / "x").exists()


@pytest.mark.parametrize(
    ("block", "line", "says"),
    [
        ("```python\nx = 1\n\ny = x / 0\n```\n", 5, "ZeroDivisionError"),
        ("```python\nx = 1\ny = = 2\n```\n", 4, "SyntaxError"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", 7, "the example above gives"),
        ("```python raises=ValueError\nx = 1\n```\n", 3, "no ValueError was raised"),
        ("```python raises=ValueError\nx = 1\nx.gone\n```\n", 4, "AttributeError"),
        ("```python raises=ValueError\nint('x')\n```\n\n```text\nValueError: else\n```\n", 7, "invalid literal"),
    ],
)
def test_examples_that_fail(tmp_path: pathlib.Path, block: str, line: int, says: str) -> None:
    with pytest.raises(snippets.Failure, match=says) as caught:
        snippets.run(page(tmp_path, "\n" + block), tmp_path)
    assert caught.value.line == line


def test_an_expected_error_shows_the_line_of_the_block(tmp_path: pathlib.Path) -> None:
    text = """
```python
import nnsight_go.errors as e
from nnsight_go.positions import fields, here
```

```python raises=NnsightError

raise e.InputError("no", **fields(here()))
```

```text
InputError: no
  your line: example.py:2
      raise e.InputError("no", **fields(here()))
```
"""
    assert snippets.run(page(tmp_path, text), tmp_path) == 2
