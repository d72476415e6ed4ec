"""Write constraints.txt: the installed version of every package that the requirements in
settings.ini pull in."""

import re
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
# Tools that every machine brings itself; a pin would only fight with them.
UNPINNED = {"pip", "wheel", "setuptools"}
# Packages whose tested version refuses an older Python 3.11: the first Python that takes it, and
# the version before that.
# Debian 12 brings 3.11.2.
OLDER_PYTHON = {"soupsieve": ("3.11.5", "2.10")}
HEAD = """\
# The tested set: `pip install -c constraints.txt "scemb[...]"` gives these versions, from
# Python 3.11 on.
# Written by `make constraints` from an environment that passed `make test`; the wanted ranges
# stand in settings.ini.
"""


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted(requirements):
    """Name -> version of everything that `requirements` (a list of strings) need here, extras
    included."""
    pins, todo, seen = {}, [Requirement(r) for r in requirements], set()
    while todo:
        req = todo.pop()
        key = (canonical(req.name), frozenset(req.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            dist = distribution(req.name)
        except PackageNotFoundError:
            sys.exit(f"{req} is wanted by settings.ini but not installed; run `make test` first.")
        pins[key[0]] = dist.version.split("+")[0]
        for line in dist.requires or []:
            child = Requirement(line)
            if child.marker is None or any(
                child.marker.evaluate({"extra": e}) for e in {"", *req.extras}
            ):
                todo.append(child)
    return pins


def line(name, version):
    "One pin, or two where an older Python needs another version."
    if name not in OLDER_PYTHON:
        return f"{name}=={version}\n"
    python, older = OLDER_PYTHON[name]
    return (
        f'{name}=={version}; python_full_version >= "{python}"\n{name}=={older}; '
        f'python_full_version < "{python}"\n'
    )


def words():
    "Every requirement that settings.ini names, for users, extras and development."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    cfg = settings["DEFAULT"]
    return [w for key in cfg if key.endswith("requirements") for w in cfg[key].split()]


if __name__ == "__main__":
    pins = {n: v for n, v in wanted(words()).items() if n not in UNPINNED}
    (ROOT / "constraints.txt").write_text(
        HEAD + "".join(line(n, v) for n, v in sorted(pins.items())), encoding="utf-8"
    )
    print(f"constraints.txt: {len(pins)} packages")
