"""Checks that read the pages without running them.

Each check takes the project's root folder and returns complaints, one a line; none means that it
passed.
"""

import ast
import hashlib
import json
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE_BYTES = 200 * 1024  # what a page may weigh in git, outputs included
TAGGED = ("launch", "figures", "benchmarks")  # folders of papermill pages
# Wings of the house, lowest first: a page imports from lower wings and from lower pages of its own.
WINGS = "data stats corpus tokens model adapt perturb network disease judge draw app".split()
GENERATED = {"sidebar.yml", "nbdev.yml", ".last_checked"}
SKIP_DIRS = {
    ".git",
    ".venv",
    "runs",
    "local",
    "build",
    "dist",
    "_docs",
    "_proc",
    "__pycache__",
    ".ipynb_checkpoints",
    ".ruff_cache",
    ".hypothesis",
}
TEXT = {
    ".py",
    ".md",
    ".toml",
    ".yml",
    ".yaml",
    ".json",
    ".ini",
    ".txt",
    ".csv",
    ".tsv",
    ".css",
    ".in",
    "",
}

WALK = re.compile(r"(\d+)([a-z]?)_(\w+)\.ipynb")
ABSOLUTE = re.compile(r"(?<![\w.~)}\]>*-])/(?:work|farm|root|home|tmp|mnt|opt|Users)/\w[\w./-]*")
PROGRESS = re.compile(
    r"\d%\|.*\||[\d.]+\s?(?:it/s|s/it)\b|\bWall time:|\bCPU times:|\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
)
INLINE_IMAGE = re.compile(r"data:image/[\w+.-]+;base64,[A-Za-z0-9+/=\s]+")
# The package must run without the tools that write it, and load what is slow only where it is used.
AUTHORING = {"nbdev", "fastcore", "execnb"}
LAZY = {
    "scanpy",
    "jax",
    "deepspeed",
    "tiledbsoma",
    "tiledbsoma_ml",
    "cellxgene_census",
    "peft",
    "torch_geometric",
    "scib_metrics",
}


@dataclass
class Page:
    path: Path
    rel: str  # path below nbs/, such as launch/demo.ipynb
    nb: dict

    @property
    def cells(self):
        return self.nb["cells"]

    @property
    def folder(self):
        return self.rel.split("/")[0] if "/" in self.rel else ""

    @property
    def order(self):
        "(wing, number, letter) of a page of the walk; None for every other page."
        m = WALK.fullmatch(self.rel.split("/")[-1])
        if not m or (self.folder and self.folder not in WINGS):
            return None
        return (WINGS.index(self.folder) if self.folder else -1, int(m[1]), m[2])

    @property
    def module(self):
        "The module that the page writes, from `#| default_exp`."
        for c in self.cells:
            m = c["cell_type"] == "code" and re.search(
                r"^#\|\s*default_exp\s+(\S+)", text(c["source"]), re.M
            )
            if m:
                return m[1]


def text(lines):
    "Notebook files keep a text as one string or as a list of lines."
    return lines if isinstance(lines, str) else "".join(lines)


def pages(root):
    "Every page below nbs/ in the order of its path; a page that is no notebook raises ValueError."
    found = []
    for p in sorted((root / "nbs").rglob("*.ipynb")):
        rel = p.relative_to(root / "nbs").as_posix()
        if any(part[0] in "._" for part in rel.split("/")):
            continue
        try:
            found.append(Page(p, rel, json.loads(p.read_text(encoding="utf-8"))))
        except ValueError as e:
            raise ValueError(f"nbs/{rel} is not a notebook: {e}") from e
    return found


def directives(cell):
    "Names of a code cell's `#|` lines, such as export, hide, slow, eval: false."
    return (
        {m.strip() for m in re.findall(r"^\s*#\|\s*(.+)$", text(cell["source"]), re.M)}
        if cell["cell_type"] == "code"
        else set()
    )


def exported(cell):
    return any(d.split()[0] in ("export", "exporti", "exports") for d in directives(cell))


def trees(page):
    "(cell number, cell, syntax tree) of each Python cell; shell and magic lines are left out."
    for n, cell in enumerate(page.cells):
        src = text(cell["source"])
        if cell["cell_type"] != "code" or src.lstrip().startswith("%%"):
            continue
        if any(re.fullmatch(r"eval:\s*false", d) for d in directives(cell)):
            continue
        lines = [
            re.sub(r"^(\s*)(?:%+[a-z]|!(?!=)|\?).*", r"\1pass", line) for line in src.split("\n")
        ]
        src = "\n".join(lines)
        yield n, cell, ast.parse(src)


def imports(tree, package, modules=()):
    """Modules of `package` that a tree imports, at any depth: `from scemb.data.genes import x` and
    `from scemb.data import genes` give data.genes."""

    def named(path):
        "The module of a dotted path, whose last words may be names in it."
        words = path.split(".")
        for n in range(len(words), 0, -1):
            if ".".join(words[:n]) in modules:
                return ".".join(words[:n])
        return path

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.startswith(f"{package}."):
                    yield named(a.name.removeprefix(f"{package}."))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = f"{package}.{base}".rstrip(".")
            if base != package and not base.startswith(f"{package}."):
                continue
            inside = base.removeprefix(package).lstrip(".")
            if inside in modules or (inside and not modules):
                yield inside
                continue
            for a in node.names:
                name = f"{inside}.{a.name}".lstrip(".")
                if name in WINGS:  # the package of a wing defines nothing, unless a page writes it
                    name = f"{name}.__init__"
                    if name not in modules:
                        continue
                if not a.name.startswith("__") and a.name != "*":
                    yield name
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
        ):
            name = (
                node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            )
            if str(name).startswith(f"{package}."):
                yield named(name.removeprefix(f"{package}."))


def check_order(root, package="scemb"):
    "A page of the walk imports only from lower pages; every imported module has a page."
    found, bad = pages(root), []
    owner = {}
    for p in found:
        if not p.module:
            continue
        if p.module in owner:
            bad.append(
                f"nbs/{p.rel} and nbs/{owner[p.module].rel} both write {package}.{p.module}."
            )
        owner[p.module] = p
    walk = sorted((p for p in found if p.order), key=lambda p: p.order)
    for a, b in zip(walk, walk[1:], strict=False):
        if a.order == b.order:
            bad.append(
                f"nbs/{a.rel} and nbs/{b.rel} have the same number; give the later one a letter."
            )
    for p in found:
        if p.folder in ("", *WINGS) and not p.order and p.rel != "index.ipynb":
            bad.append(
                f"nbs/{p.rel} has no number: a page of the walk is called like 07a_name.ipynb."
            )
        try:
            cells = list(trees(p))
        except SyntaxError as e:
            bad.append(
                f"nbs/{p.rel}: a code cell is not Python: {e.msg}, line {e.lineno}: "
                f"{(e.text or '').strip()}"
            )
            continue
        for n, _, tree in cells:
            for name in imports(tree, package, owner):
                if name not in owner:
                    bad.append(
                        f"nbs/{p.rel} cell {n} imports {package}.{name}, which no page writes."
                    )
                elif not p.order:
                    continue
                elif name == p.module:
                    bad.append(
                        f"nbs/{p.rel} cell {n} imports its own module {package}.{name}; the "
                        "cells above already define it."
                    )
                elif not owner[name].order:
                    bad.append(
                        f"nbs/{p.rel} cell {n} imports {package}.{name}, which "
                        f"nbs/{owner[name].rel} writes outside the walk."
                    )
                elif owner[name].order > p.order:
                    bad.append(
                        f"nbs/{p.rel} cell {n} imports {package}.{name} from the higher page "
                        f"nbs/{owner[name].rel}; join the two in a later page."
                    )
    return bad


def check_heads(root):
    """A page opens with a markdown cell of its title and one sentence, which nbdev turns into the
    head of the rendered page."""
    bad = []
    for p in pages(root):
        head = next(
            (text(c["source"]).strip() for c in p.cells if c["cell_type"] == "markdown"), ""
        )
        if not re.fullmatch(r"# \S.*\n\n> \S.*", head):
            bad.append(
                f"nbs/{p.rel}: the first markdown cell must be `# Title`, an empty line and `> "
                "one sentence`, and nothing else: the documentation drops the rest. It starts "
                f"{head[:50]!r}."
            )
        if p.order and not p.module:
            bad.append(
                f"nbs/{p.rel} has no `#| default_exp name`; a page of the walk writes a module."
            )
    return bad


def check_parameters(root):
    """Exactly one code cell tagged `parameters`, of plain literals, in each papermill page (at most
    one in figures/, whose pages may only show); none in the walk."""
    bad = []
    for p in pages(root):
        tagged = [c for c in p.cells if "parameters" in (c["metadata"].get("tags") or [])]
        if p.folder in TAGGED:
            only_shows = p.folder == "figures" and not tagged
            if len(tagged) != 1 and not only_shows:
                bad.append(
                    f"nbs/{p.rel} has {len(tagged)} cells tagged `parameters`, wanted exactly "
                    "one; without it papermill's values are overwritten."
                )
                continue
            if not tagged:
                continue
            if tagged[0]["cell_type"] != "code":
                bad.append(f"nbs/{p.rel}: the cell tagged `parameters` is not a code cell.")
                continue
            try:
                for node in ast.parse(text(tagged[0]["source"])).body:
                    value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else node
                    ast.literal_eval(value)
                    if value is node:
                        raise ValueError
            except (ValueError, TypeError, SyntaxError):
                bad.append(
                    f"nbs/{p.rel}: the cell tagged `parameters` must hold only `name = literal` "
                    "lines, so that a parameter file can set each."
                )
        elif p.order or p.rel == "index.ipynb":
            if tagged:
                bad.append(
                    f"nbs/{p.rel} is a page of the walk but has a cell tagged `parameters`; "
                    f"papermill pages live in {', '.join(TAGGED)}."
                )
    return bad


def shown(output):
    "The text of one output as a reader sees it, without pictures."
    data = output.get("data", {})
    parts = [text(v) for k, v in data.items() if k.startswith("text/")]
    return INLINE_IMAGE.sub("", "\n".join([*parts, text(output.get("text", ""))]))


def check_outputs(root):
    """A page weighs less than 200 KB and stores no error, widget, progress bar, timing or dated
    line of a log."""
    bad = []
    for p in pages(root):
        size = p.path.stat().st_size
        if size >= PAGE_BYTES:
            bad.append(
                f"nbs/{p.rel} weighs {size / 1024:.0f} KB, wanted less than {PAGE_BYTES // 1024} "
                "KB: make its pictures smaller or print less."
            )
        for n, cell in enumerate(p.cells):
            where = f"nbs/{p.rel} cell {n}"
            for out in cell.get("outputs", []):
                if out["output_type"] == "error":
                    bad.append(f"{where} stores an error: {out.get('ename')}: {out.get('evalue')}")
                if any("jupyter.widget" in k for k in out.get("data", {})):
                    bad.append(f"{where} stores a widget, which nobody else can see.")
                m = PROGRESS.search(shown(out))
                if m or "\r" in shown(out).replace("\r\n", "\n"):
                    bad.append(
                        f"{where} stores a progress bar or timing: "
                        f"{(m[0] if m else 'carriage return')[:60]!r}"
                    )
        if p.nb.get("metadata", {}).get("widgets"):
            bad.append(f"nbs/{p.rel} stores widget state.")
    return list(dict.fromkeys(bad))


def files(root):
    "Files of the project, without what .gitignore leaves out."
    for folder, dirs, names in os.walk(root):
        dirs[:] = sorted(d for d in dirs if d not in SKIP_DIRS and not d.endswith(".egg-info"))
        for n in sorted(names):
            if n not in GENERATED:
                yield Path(folder) / n


def check_paths(root):
    "No absolute path of somebody's machine, in sources, outputs or any other text file."
    bad = []
    for p in pages(root):
        for n, cell in enumerate(p.cells):
            for kind, s in [
                ("source", text(cell["source"])),
                *(("output", shown(o)) for o in cell.get("outputs", [])),
            ]:
                for m in ABSOLUTE.findall(s):
                    bad.append(
                        f"nbs/{p.rel} cell {n} {kind} has the absolute path {m}; print a name or "
                        "a relative path."
                    )
    for f in files(root):
        if f.is_symlink() or f.suffix not in TEXT or f.stat().st_size > 2**20:
            continue
        try:
            s = f.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        bad += [f"{f.relative_to(root)} has the absolute path {m}." for m in ABSOLUTE.findall(s)]
    return list(dict.fromkeys(bad))


def check_modules(root, package="scemb"):
    """Each module comes from a page and loads neither the authoring tools nor slow libraries when
    it is imported."""
    bad, found = [], pages(root)
    written = {f"{p.module.replace('.', '/')}.py" for p in found if p.module} | {
        "__init__.py",
        "_modidx.py",
        *(f"{wing}/__init__.py" for wing in WINGS),
    }
    for f in sorted((root / package).rglob("*.py")):
        rel = f.relative_to(root / package).as_posix()
        if rel not in written:
            bad.append(
                f"{package}/{rel} comes from no page; pages are the only source of {package}/. "
                "Delete it or write its page."
            )
    for p in found:
        try:
            cells = [(n, t) for n, c, t in trees(p) if exported(c)]
        except SyntaxError:
            continue  # check_order names it
        for n, tree in cells:
            for node in ast.walk(tree):
                names = (
                    [a.name for a in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
                for name in {x.split(".")[0] for x in names}:
                    if name in AUTHORING:
                        bad.append(
                            f"nbs/{p.rel} cell {n} exports an import of {name}; users do not "
                            "have it."
                        )
                    if name in LAZY and node in tree.body:
                        bad.append(
                            f"nbs/{p.rel} cell {n} exports a top-level import of {name}; move it "
                            "into the function that uses it."
                        )
    return bad


def harmless(node):
    """Whether a statement may stand beside imports: definitions, and settings such as
    `plt.rcParams["figure.dpi"] = 72` or `pd.set_option(...)`."""
    if isinstance(
        node,
        ast.Import
        | ast.ImportFrom
        | ast.FunctionDef
        | ast.AsyncFunctionDef
        | ast.ClassDef
        | ast.Pass,
    ):
        return True
    if isinstance(node, ast.With | ast.Try):
        return all(
            map(harmless, [*node.body, *(s for h in getattr(node, "handlers", []) for s in h.body)])
        )
    if isinstance(node, ast.Assign):
        return isinstance(node.value, ast.Constant) and not any(
            isinstance(t, ast.Name) for t in node.targets
        )
    call = node.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
    return (
        bool(call)
        and isinstance(call.func, ast.Attribute)
        and all(
            isinstance(a, ast.Constant) for a in [*call.args, *(k.value for k in call.keywords)]
        )
    )


def check_import_cells(root):
    """On a page that exports code, a cell that imports does nothing else but set options: the
    documentation runs every such cell."""
    bad = []
    for p in pages(root):
        try:
            cells = list(trees(p))
        except SyntaxError:
            continue  # check_order names it
        if not any(exported(c) for _, c, _ in cells):
            continue
        for n, cell, tree in cells:
            works = [node for node in tree.body if not harmless(node)]
            if (
                not exported(cell)
                and works
                and any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))
            ):
                bad.append(
                    f"nbs/{p.rel} cell {n} imports and also works "
                    f"(`{ast.unparse(works[0]).splitlines()[0][:60]}`); give the imports a cell "
                    "of their own, or the documentation runs this one too."
                )
    return bad


def check_compiled(root, package="scemb", settled=("_mix64",)):
    """A compiled function that numba keeps on disk is called by no other one, and calls none of
    another module but `settled` ones, which never change.

    Numba renews what it kept when the file of that one function changes, whatever became of the
    functions inside it; and its index of the
    variants of a function has no lock, while inner functions have several variants that test
    workers store at the same time.
    """
    bad, compiled = [], {}  # (module, function) -> (kept on disk, names called)
    for f in sorted((root / package).rglob("*.py")):
        for node in ast.walk(ast.parse(f.read_text(encoding="utf-8"))):
            made = next(
                (
                    d
                    for d in getattr(node, "decorator_list", [])
                    if ast.unparse(d).startswith("njit")
                ),
                None,
            )
            if made is None:
                continue
            kept = isinstance(made, ast.Call) and any(
                k.arg == "cache" and ast.unparse(k.value) != "False" for k in made.keywords
            )
            compiled[f.stem, node.name] = (
                kept,
                {
                    n.func.id
                    for n in ast.walk(node)
                    if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
                },
            )
    for (module, name), (kept, calls) in compiled.items():
        for called in sorted(calls):
            home = (
                module
                if (module, called) in compiled
                else next((m for m, n in compiled if n == called), None)
            )
            if home and compiled[home, called][0]:
                bad.append(
                    f"{package}/{module}.py: {name} calls {called}, which numba keeps on disk; "
                    "give cache=True to the outermost function only."
                )
            elif home not in (None, module) and kept and called not in settled:
                bad.append(
                    f"{package}/{module}.py: numba keeps {name} on disk with {called} of {home} "
                    "inside, and will not see when that changes; take cache=True away."
                )
    return bad


def reads_committed(tree):
    """Whether a syntax tree names the folder of committed tables: `root/"results"`,
    `Path("../../results/fig2/baron/scores.csv")`."""
    names = (
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )
    return any(re.match(r"(?:\.\./)*results(?:/|$)", name) for name in names)


def check_claims(root):
    """A page of figures/ or benchmarks/ that shows a committed table asserts something that every
    suite runs."""
    bad = []
    for p in pages(root):
        if p.folder not in ("figures", "benchmarks"):
            continue
        try:
            cells = list(trees(p))
        except SyntaxError:
            continue  # check_order names it
        shows = any(reads_committed(tree) for _, _, tree in cells)
        run = [
            tree
            for _, cell, tree in cells
            if not {d.split()[0] for d in directives(cell)} & {"gpu", "net"}
        ]
        if shows and not any(
            isinstance(node, ast.Assert) for tree in run for node in ast.walk(tree)
        ):
            bad.append(
                f"nbs/{p.rel} shows a committed table and asserts nothing: add a hidden cell "
                "that compares the page's sentences with the table."
            )
    return bad


RECORD = {"command": (str, list), "page": str, "shown": str, "model": (str, list, dict)}
RECORD |= {"commit": str, "date": str, "files": dict}


def record_of(path, where):
    "(run record of a folder of results, complaints); `where` is what they call it."
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        return None, [f"{where} is not JSON: {e}."]
    if not isinstance(record, dict):
        return None, [f"{where} is no record: wanted an object with {', '.join(RECORD)}."]
    wrong = [k for k, kind in RECORD.items() if not isinstance(record.get(k), kind)]
    if wrong:
        return None, [f"{where} lacks {', '.join(wrong)}, or they are of another kind."]
    return record, []


def check_shelf(root):
    """What lies below results/ has a run record beside it that names it; a record names files and
    pages that exist, and the page that shows the results names their folder."""
    bad, sources = [], {}
    top = root / "results"
    if not top.exists():
        return []
    for folder in sorted({f.parent for f in files(top)}):
        where = folder.relative_to(root).as_posix()
        held = {
            f.name for f in folder.iterdir() if f.is_file() and f.suffix not in (".yaml", ".md")
        }
        path = folder / "run.json"
        if not path.exists():
            bad += [f"{where}/{name}: no run.json lies beside it." for name in sorted(held)]
            continue
        record, wrong = record_of(path, f"{where}/run.json")
        bad += wrong
        if record is None:
            continue
        named = set(record["files"])
        for name in sorted(held - named - {"run.json"}):
            bad.append(f"{where}/run.json does not say what made {name}.")
        for name in sorted(named - held):
            bad.append(f"{where}/run.json names {name}, which is not there.")
        for key in ("page", "shown"):
            if not (root / record[key]).is_file():
                bad.append(f"{where}/run.json: its {key} {record[key]} does not exist.")
        shown = root / record["shown"]
        if shown.suffix != ".ipynb" or not shown.is_file():
            continue
        if shown not in sources:
            cells = json.loads(shown.read_text(encoding="utf-8"))["cells"]
            sources[shown] = "\n".join(text(c["source"]) for c in cells)
        if not re.search(rf"{re.escape(where)}(?![\w-])", sources[shown]):
            bad.append(f"{record['shown']} shows {where} and does not name this folder.")
    return bad


# Names of functions, by their beginning, that return nothing to look at.
SILENT = (
    "test_",
    "assert",
    "check_",
    "write",
    "save",
    "to_",
    "close",
    "cleanup",
    "rmtree",
    "remove",
    "unlink",
    "copy",
    "mkdir",
    "set_",
)


def silent_functions(page):
    "Functions defined on a page that never return a value."
    names = set()
    for _, _, tree in trees(page):
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            returns = [
                n
                for n in ast.walk(node)
                if isinstance(n, ast.Return | ast.Yield | ast.YieldFrom) and n.value is not None
            ]
            if not returns:
                names.add(node.name)
    return names


def shows_something(node, silent):
    "Whether a statement leaves something below its cell: a value, or what is printed."
    if not isinstance(node, ast.Expr):
        return False
    if isinstance(node.value, ast.Constant):
        return False
    if not isinstance(node.value, ast.Call):
        return True
    name = getattr(node.value.func, "attr", getattr(node.value.func, "id", ""))
    if name == "print":
        return not any(k.arg == "file" for k in node.value.keywords)
    return not name.startswith(SILENT) and name not in silent


def check_shown(root):
    "A visible cell that ends in a value has an output."
    bad = []
    for p in pages(root):
        try:
            cells, silent = list(trees(p)), silent_functions(p)
        except SyntaxError:
            continue  # check_order names it
        for n, cell, tree in cells:
            flags = {d.split()[0].rstrip(":") for d in directives(cell)}
            if exported(cell) or flags & {"hide", "gpu", "net"} or not tree.body:
                continue
            ends_quietly = text(cell["source"]).rstrip().endswith(";")
            if ends_quietly or cell.get("outputs") or not shows_something(tree.body[-1], silent):
                continue
            last = ast.unparse(tree.body[-1]).splitlines()[0][:60]
            bad.append(
                f"nbs/{p.rel} cell {n} ends in `{last}` but stores no output: run the page and "
                "save it, or hide the cell."
            )
    return bad


def snapshot(root, folders=("nbs", "scemb")):
    """Path -> hash of what git would keep below `folders`; two snapshots differ where `git diff`
    would."""
    seen = {}
    for folder in folders:
        for f in files(root / folder):
            seen[f.relative_to(root).as_posix()] = (
                os.readlink(f) if f.is_symlink() else hashlib.sha256(f.read_bytes()).hexdigest()
            )
    return seen


def changed(before, after):
    "Paths that differ between two snapshots."
    return sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))


# --- the sidebar of the documentation -------------------------------------------------------------

START = (
    "index.ipynb",
    "explain/glossary.ipynb",
    "explain/architecture.ipynb",
    "explain/paper_map.ipynb",
)
# What one came to do, and the page that shows it. These pages stand in their own sections, too.
TASKS = (
    ("Read my file", "tutorials/a_file_of_your_own.ipynb"),
    ("Embed my cells", "tutorials/embed_your_cells.ipynb"),
    ("Annotate cells", "tutorials/annotate_a_new_sample.ipynb"),
    ("Integrate batches", "adapt/08_integrate.ipynb"),
    ("Perturb a gene", "tutorials/knock_out_a_gene.ipynb"),
    ("Use Geneformer's weights", "tutorials/geneformer_protocol.ipynb"),
    ("Screen all genes", "perturb/03_screen.ipynb"),
    ("Correlate with a disease", "tutorials/match_a_disease_to_a_perturbation.ipynb"),
    ("Compare methods", "judge/06_benchmark.ipynb"),
    ("Pretrain a model", "launch/pretrain.ipynb"),
)


def title(page):
    "The title of a page, from its first markdown cell; its path where it has none."
    heads = (text(c["source"]) for c in page.cells if c["cell_type"] == "markdown")
    found = re.match(r"\s*# (.+)", next(heads, ""))
    return found[1].strip() if found else page.rel


def sidebar(root):
    """The sidebar, made from the folders: a list of (title, page) and of (section, list of the
    same)."""
    found = pages(root)

    def link(page):
        "A page under its title, without the word that its section says already."
        short = re.sub(r"^(?:Benchmark|Launch): (\w)", lambda m: m[1].upper(), title(page))
        return short, page.rel

    links = {page.rel: link(page) for page in found}

    def inside(folder):
        "The pages of a folder, in the order of the walk or of their names; not those of Start."
        below = [page for page in found if page.folder == folder and page.rel not in START]
        below.sort(key=lambda page: (page.order or (), page.rel))
        return [links[page.rel] for page in below]

    wings = [(wing.capitalize(), inside(wing)) for wing in WINGS]
    lines = {
        "Start": [links[rel] for rel in START if rel in links],
        "Tutorials": inside("tutorials"),
        "By task": [(task, rel) for task, rel in TASKS if rel in links],
        "Figures": inside("figures"),
        "Chapters": [(wing, below) for wing, below in wings if below],
        "Decisions": inside("explain"),
        "Launch": inside("launch"),
        "Benchmarks": inside("benchmarks"),
    }
    return [(section, below) for section, below in lines.items() if below]


def check_sidebar(root):
    """Every page stands in one section of the sidebar and has a title of its own there; the lists
    of Start and By task name pages that exist."""

    def targets(lines):
        for _, target in lines:
            if isinstance(target, str):
                yield target
            else:
                yield from targets(target)

    found, bad = pages(root), []
    sections = [(name, below) for name, below in sidebar(root) if name != "By task"]
    shown = list(targets(sections))
    for page in found:
        if page.rel not in shown:
            bad.append(
                f"nbs/{page.rel} stands in no section of the sidebar: move it to a wing, "
                "tutorials, figures, explain, launch or benchmarks, or give its folder a section "
                "in `sidebar` of .ci/checks.py."
            )
    titles = {}
    for page in found:
        titles.setdefault((page.folder, title(page)), []).append(page.rel)
    for (_, name), same in titles.items():
        if len(same) > 1:
            bad.append(f"nbs/{' and nbs/'.join(same)} have the same title, {name!r}.")
    if (root / "nbs" / "explain").is_dir():
        named = [*START, *(rel for _, rel in TASKS)]
        missing = {rel for rel in named if not (root / "nbs" / rel).is_file()}
        bad += [
            f"START or TASKS of .ci/checks.py names nbs/{rel}, which does not exist."
            for rel in sorted(missing)
        ]
    return bad


# --- one vocabulary -------------------------------------------------------------------------------


def headings(page):
    "The headings of a page, without what stands in code fences."
    for cell in page.cells:
        if cell["cell_type"] != "markdown":
            continue
        fenced = False
        for line in text(cell["source"]).split("\n"):
            if line.lstrip().startswith(("```", "~~~")):
                fenced = not fenced
            found = re.match(r"#+ +(.+)", line)
            if found and not fenced:
                yield found[1].strip()


def public_names(tree):
    """Functions, classes, methods, parameters, fields and command-line options that an exported
    cell defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"--[a-z][a-z-]*", node.value):
                yield node.value
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in [*tree.body, *(line for made in classes for line in made.body)]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            a = node.args
            yield from (arg.arg for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs])
        if isinstance(node, ast.AnnAssign) and node not in tree.body:
            if isinstance(node.target, ast.Name):
                yield node.target.id


def spoken(name):
    "A name or heading as lower-case words: `guide_test`, `--max-len`, GuideTest, `Max len`."
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return " ".join(re.findall(r"[a-z]+", parted.lower()))


def places(root):
    "(place, name) of every heading and public name: the place is the page or the module."
    for page in pages(root):
        for heading in headings(page):
            yield page.rel, heading
        if not page.module:
            continue
        try:
            cells = list(trees(page))
        except SyntaxError:
            continue  # check_order names it
        for _, cell, tree in cells:
            if exported(cell):
                yield from ((page.module, name) for name in public_names(tree))


def check_vocabulary(root):
    """Headings, options and public names use the settled words of .ci/vocabulary.toml, but for the
    exceptions that it names."""
    table = root / ".ci" / "vocabulary.toml"
    if not table.is_file():
        return []
    bad, seen = [], sorted(set(places(root)))
    for rule in tomllib.loads(table.read_text(encoding="utf-8"))["word"]:
        allowed = {place for group in rule.get("exception", []) for place in group["places"]}
        for place, name in seen:
            is_heading = place.endswith(".ipynb")
            if f"{place}: {name}" in allowed or (is_heading and not rule.get("headings", True)):
                continue
            if place.split(".")[0] in rule.get("free", []):
                continue
            words = spoken(name)
            for wanted in rule["use"]:
                words = re.sub(rf"\b{spoken(wanted)}s?\b", "", words)
            wrong = [w for w in rule["not"] if re.search(rf"\b{w}\b", words)]
            if wrong:
                bad.append(
                    f"{place}: {name!r} says {wrong[0]!r}; the settled word is "
                    f"{' or '.join(map(repr, rule['use']))} ({rule['because']})."
                )
    return bad


STATIC = {
    "import order": check_order,
    "page heads": check_heads,
    "sidebar": check_sidebar,
    "settled words": check_vocabulary,
    "parameters cells": check_parameters,
    "page outputs": check_outputs,
    "values are shown": check_shown,
    "absolute paths": check_paths,
    "modules": check_modules,
    "imports in cells of their own": check_import_cells,
    "compiled functions kept on disk": check_compiled,
    "claims are asserted": check_claims,
    "results have their run records": check_shelf,
}
