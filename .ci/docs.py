"""Render the documentation into _docs/ and make README.md from nbs/index.ipynb.

docs.py build            Quarto when it is installed, otherwise an approximation of it that needs no
other program
docs.py readme           write README.md
docs.py readme --check   exit code 1 when README.md is not what the index gives
"""

import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from checks import ROOT, directives, pages, text

TARGET = re.compile(
    r"(!?\[[^\]]*\]\()([^)\s]+)((?:\s+\"[^\"]*\")?\))|((?:src|href)=\")([^\"]+)(\")"
)


def html_name(rel):
    "The file that a page is rendered to: 00_genes.ipynb becomes genes.html, as nbdev names it."
    folder, _, name = rel.rpartition("/")
    name = re.sub(r"^\d+[a-zA-Z0-9]*_", "", name.lower()).removesuffix(".ipynb") + ".html"
    return f"{folder}/{name}" if folder else name


def outside_fences(markdown, change):
    "Apply `change` to the lines of a Markdown text that are not inside a code fence."
    fenced, lines = False, []
    for line in markdown.split("\n"):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        lines.append(line if fenced else change(line))
    return "\n".join(lines)


def relative(target):
    return not urlsplit(target).scheme and not target.startswith(("#", "/"))


# --- README ---------------------------------------------------------------------------------------


def readme(root):
    "(text of README.md, complaints): the index as Markdown, its links seen from the top folder."
    import nbformat
    from nbconvert import MarkdownExporter

    nb, bad = nbformat.read(root / "nbs" / "index.ipynb", as_version=4), []
    settings = ConfigParser(delimiters=["="])
    settings.read(root / "settings.ini", encoding="utf-8")
    hosted = f"{settings['DEFAULT']['git_url']}/blob/{settings['DEFAULT']['branch']}/"

    def from_top(m):
        head, target, tail = m.group(1, 2, 3) if m[1] else m.group(4, 5, 6)
        if not relative(target) and not target.startswith(hosted):
            return m[0]
        path, hash_, anchor = target.partition("#")
        moved = (
            path.removeprefix(hosted)
            if path.startswith(hosted)
            else posixpath.normpath(posixpath.join("nbs", path))
        )
        if not (root / unquote(moved)).exists():
            bad.append(f"nbs/index.ipynb links to {target}, which does not exist.")
        return f"{head}{moved}{hash_}{anchor}{tail}"

    kept = []
    for cell in nb.cells:
        if {d.split()[0] for d in directives(cell)} & {"hide", "default_exp", "export", "exporti"}:
            continue
        if "echo: false" in directives(cell):  # only what it makes, as the documentation shows it
            cell = nbformat.v4.new_markdown_cell(
                "\n\n".join(
                    text(o.data["text/markdown"])
                    for o in cell.outputs
                    if "text/markdown" in o.get("data", {})
                )
            )
        if cell.cell_type == "markdown":
            cell.source = outside_fences(cell.source, lambda line: TARGET.sub(from_top, line))
        if cell.cell_type == "code":
            cell.source = re.sub(r"^\s*#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for o in cell.outputs:
                if "text/html" in o.get("data", {}):
                    o.data["text/html"] = re.sub(
                        r"<style.*?</style>\s*", "", text(o.data["text/html"]), flags=re.S
                    )
                if any(k.startswith("image/") for k in o.get("data", {})):
                    bad.append(
                        "nbs/index.ipynb shows a picture made by a cell; save it in nbs/images/ "
                        "and show it as ![caption](images/name.png)."
                    )
        if cell.source:
            kept.append(cell)
    nb.cells, nb.metadata["language_info"] = kept, {"name": "python"}
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in body.strip().split("\n")))
    return (
        "<!-- Made from nbs/index.ipynb by `make readme`; edit the page, not this file. "
        f"-->\n\n{body}\n",
        bad,
    )


def check_readme(root):
    wanted, bad = readme(root)
    have = (root / "README.md").read_text(encoding="utf-8") if (root / "README.md").exists() else ""
    if have != wanted:
        a, b = have.split("\n"), wanted.split("\n")
        n = next(
            (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
        )
        bad.append(
            f"README.md is not what nbs/index.ipynb gives (line {n + 1}: "
            f"{a[n] if n < len(a) else 'end of file'!r}, wanted "
            f"{b[n] if n < len(b) else 'end of file'!r}); run `make readme`."
        )
    return bad


# --- documentation --------------------------------------------------------------------------------


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets = []

    def handle_starttag(self, tag, attrs):
        self.targets += [
            v
            for k, v in attrs
            if v
            and (tag, k) in {("a", "href"), ("img", "src"), ("link", "href"), ("script", "src")}
        ]


def check_site(site, wanted):
    """Complaints about a rendered site: `wanted` files that are missing, relative links that lead
    nowhere."""
    bad = [f"{name} was not rendered." for name in wanted if not (site / name).is_file()]
    for f in sorted(site.rglob("*.html")):
        links = Links()
        links.feed(f.read_text(encoding="utf-8"))
        for target in dict.fromkeys(links.targets):
            path = unquote(urlsplit(target).path)
            if not path or not relative(target):
                continue
            led_to = (f.parent / path).resolve()
            if not led_to.exists():
                bad.append(f"{f.relative_to(site)} links to {target}, which does not exist.")
            elif not led_to.is_relative_to(site.resolve()):
                bad.append(f"{f.relative_to(site)} links to {target}, which is not in the site.")
    return bad


def stage(proc, site_url, out):
    """Copy nbdev's processed pages, named as they will be rendered: the offline renderer knows no
    `output-file`."""
    shutil.copytree(proc, out, ignore=shutil.ignore_patterns("_docs", "_site"))
    names = {}
    for p in sorted(out.rglob("*.ipynb")):
        new = Path(html_name(p.relative_to(out).as_posix())).with_suffix(".ipynb")
        names[p.name] = new.name
        p.rename(out / new)
    pattern = (
        re.compile(
            "|".join(rf"(?<![\w]){re.escape(n)}" for n in sorted(names, key=len, reverse=True))
        )
        if names
        else None
    )

    def renamed(s):
        return pattern.sub(lambda m: names[m[0]], s) if pattern else s

    for f in out.rglob("*.yml"):
        f.write_text(renamed(f.read_text(encoding="utf-8")), encoding="utf-8")
    for f in out.rglob("*.ipynb"):
        nb = json.loads(f.read_text(encoding="utf-8"))
        top = "../" * (len(f.relative_to(out).parts) - 1) or "./"
        for c in nb["cells"]:
            if c["cell_type"] == "markdown":
                c["source"] = outside_fences(
                    nearer(renamed(text(c["source"]))), lambda s, top=top: s.replace(site_url, top)
                )
            if c["cell_type"] == "raw":
                c["source"] = re.sub(r"^output-file:.*\n", "", text(c["source"]), flags=re.M)
            for o in c.get("outputs", []):
                md = o.get("data", {}).get("text/markdown")
                if md:
                    o["data"]["text/markdown"] = nearer(text(md).replace(site_url, top))
        f.write_text(json.dumps(nb, ensure_ascii=False, indent=1), encoding="utf-8")


RESULTS = re.compile(r"""(\]\(|(?:src|href)=")\.\./\.\./results/""")


def nearer(markup):
    """Links of a page of `nbs/FOLDER/` to results/, as they are in the site, where `../../results/`
    is one folder nearer."""
    return RESULTS.sub(r"\1../results/", markup)


def bring_results(root, site):
    "Copy what pages show of results/ into the site, and lead the links of rendered pages there."
    for f in sorted((root / "results").rglob("*")):
        if f.suffix in (".png", ".csv", ".json", ".yaml"):
            to = site / f.relative_to(root)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(f, to)
    for page in site.glob("*/*.html"):
        body = page.read_text(encoding="utf-8")
        if nearer(body) != body:
            page.write_text(nearer(body), encoding="utf-8")


def build(root):
    "Render every page into _docs/; returns complaints."
    from nbdev.config import get_config

    cfg, docs = get_config(), root / "_docs"
    os.chdir(root / "nbs")  # exported cells run here, as they do in JupyterLab and in the tests
    sys.path.insert(0, str(root))
    if shutil.which("quarto"):
        print("docs: rendering with Quarto", flush=True)
        subprocess.run([str(Path(sys.executable).parent / "nbdev_docs")], check=True)
    else:
        print(
            "docs: Quarto is not installed, so smalldocs renders an approximation of it", flush=True
        )
        from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
        from nbdev.serve import proc_nbs

        shutil.rmtree(root / "_proc", ignore_errors=True)
        refresh_quarto_yml()
        nbdev_sidebar.__wrapped__()
        try:
            proc_nbs(n_workers=0)
        except Exception as e:
            return [
                f"{str(e).splitlines()[0]} {type(e.__cause__).__name__}: {e.__cause__}"
            ]  # nbdev names page and cell
        with tempfile.TemporaryDirectory() as tmp:
            staged = Path(tmp) / "site"
            stage(root / "_proc", f"{cfg.doc_host}{cfg.doc_baseurl}/", staged)
            bring_results(root, staged)
            # An iframe without height and the like are not worth a failure; a page that is not
            # rendered is, below.
            subprocess.run(
                [str(Path(sys.executable).parent / "smalldocs"), "render", "--quiet", str(staged)],
                check=True,
            )
            shutil.rmtree(docs, ignore_errors=True)
            shutil.copytree(staged / docs.name, docs)
    bring_results(root, docs)
    bad = check_site(docs, [html_name(p.rel) for p in pages(root)])
    print(
        f"docs: {sum(1 for _ in docs.rglob('*.html'))} pages in {docs.name}/, start at "
        f"{docs.name}/index.html"
    )
    return bad


def main(action, *options):
    if action == "readme" and "--check" not in options:
        body, bad = readme(ROOT)
        (ROOT / "README.md").write_text(body, encoding="utf-8")
    else:
        bad = check_readme(ROOT) if action == "readme" else build(ROOT)
    print("\n".join(bad), end="\n" if bad else "")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["build"])))
