"""The pages of the site that the code knows, written at each build and never kept: a hook of mkdocs.

What a key, a dose or an option means is its comment, its docstring or its help in the source; this file only lays it
out.  `columns.yaml` says what the code has no sentence for, and a name there that the code lacks stops the build.
"""

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
ROOT = HERE.parent
SAID = yaml.safe_load((HERE / "columns.yaml").read_text())


# -- what a dataclass says of its fields -------------------------------------------------------------------------------
def comments_of(cls: type) -> dict[str, str]:
    """Field -> the comment behind it, or those above it, of the class and what it inherits."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(one))
        except (OSError, TypeError):
            continue
        found |= _comments_in(source)
    return found


def _comments_in(source: str) -> dict[str, str]:
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    (body,) = ast.parse(source).body
    for node in getattr(body, "body", []):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        last = node.end_lineno or node.lineno
        said = [comments[line] for line in range(node.lineno, last + 1) if line in comments]
        above = node.lineno - 1
        while above in comments and lines[above - 1].lstrip().startswith("#"):
            said.insert(0, comments[above])
            above -= 1
        found[node.target.id] = " ".join(said)
    return found


def default_of(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return shown(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return shown(field.default_factory())
    return "required"


def shown(value: Any) -> str:
    """As YAML writes it."""
    from ablab.core.language.part import Part

    if isinstance(value, Part):
        return f"`{value.kind}`"
    if dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
        return "AdamW"  # optim.chains, the only mapping of that kind
    if value in ((), [], {}, ""):
        return "none"
    plain = list(value) if isinstance(value, tuple) else value
    written = yaml.safe_dump(plain, default_flow_style=True, width=200)
    return f"`{written.removesuffix('...' + chr(10)).strip()}`"


def type_of(hint: Any) -> str:
    """In words that a user of YAML knows."""
    if doc := next(
        (one for one in getattr(hint, "__metadata__", ()) if isinstance(one, str)), ""
    ):
        return doc
    origin, inside = get_origin(hint), get_args(hint)
    if hint is type(None):
        return "null"
    if str(origin) == "typing.Literal":
        return ", ".join(f"`{one}`" for one in inside)
    if str(origin) in ("<class 'types.UnionType'>", "typing.Union"):
        return " or ".join(type_of(one) for one in inside)
    if origin in (list, tuple):
        return "list of " + type_of(inside[0]) if inside else "list"
    if origin is dict:
        return "mapping"
    if hasattr(hint, "__metadata__"):
        return type_of(hint.__origin__)
    if getattr(hint, "_is_protocol", False):
        return "a part"
    if known := SAID["types"].get(getattr(hint, "__name__", "")):
        return str(known)
    names = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "any"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def fields_table(cls: Any, prefix: str = "", named: dict[str, str] = {}) -> str:
    """named: field -> its name in the file, where that differs."""
    from ablab.core.language.parse import fields_of

    hints, comments = fields_of(cls), comments_of(cls)
    rows = []
    for field in dataclasses.fields(cls):
        if field.name not in hints:
            continue
        name = named.get(field.name, field.name)
        said = comments.get(field.name, "").replace("`with` in the file", "").strip(": ,")
        known = SAID["keys"].get(f"{cls.__name__}.{field.name}", "")
        says = ". ".join(part for part in (known, said) if part)
        rows.append((f"`{prefix}{name}`", type_of(hints[field.name]), default_of(field), says))
    if not rows:
        return ""
    return table(("key", "value", "default", "what it says"), rows)


def doc_of(thing: Any) -> str:
    """Its docstring as Markdown: what is indented there is a formula, the rest is text that means what it says."""
    lines = inspect.cleandoc(thing.__doc__ or "").splitlines()
    return "\n".join(line if line.startswith("    ") else _literally(line) for line in lines)


def _literally(line: str) -> str:
    """Without Markdown's own meaning of signs, but for `words of code`."""
    halves = line.split("`")
    halves[::2] = [re.sub(r"([*_<>\[\]#|])", r"\\\1", half) for half in halves[::2]]
    return "`".join(halves)


def code(text: str) -> str:
    return f"```text\n{text}\n```\n"


# -- the pages ---------------------------------------------------------------------------------------------------------
def sheet() -> str:
    from ablab.experiments.plan import sheets

    listed = {"treatment": "with"}
    parts = [
        "# The sheet\n\nAn experiment is one page of YAML. Its keys, all of them; one that it does not know is "
        "refused with its nearest neighbour.\n",
        fields_table(sheets.Sheet, named=listed),
    ]
    blocks = {
        "`metric:`": (sheets.Metric, "metric."),
        "`arms:`, an item": (sheets.ArmSheet, ""),
        "`stages:`, an item": (sheets.StageSheet, ""),
        "`study:`": (sheets.StudySheet, "study."),
    }
    for title, (cls, prefix) in blocks.items():
        parts.append(f"## {title}\n\n{doc_of(cls)}\n\n" + fields_table(cls, prefix, listed))
    parts.append(SAID["sheet_end"])
    return "\n".join(parts)


def recipe() -> str:
    from ablab.core.recipe import recipe as tree

    parts = [
        "# Recipe paths\n\nWhat `set:` and the command line may set, as `optim.lr=0.01`. "
        "Each of them is part of a run's identity.\n"
    ]
    classes = {
        "model": (tree.Model, "model."),
        "model.attention": (tree.Attention, "model.attention."),
        "optim": (tree.Optim, "optim."),
        "optim.chains[ROLE]": (tree.Chain, "optim.chains[ROLE]."),
        "data": (tree.Data, "data."),
        "budget": (tree.Budget, "budget."),
        "the rest": (tree.Recipe, ""),
    }
    for title, (cls, prefix) in classes.items():
        parts.append(f"## {title}\n\n{doc_of(cls) if cls is not tree.Budget else ''}\n")
        parts.append(fields_table(cls, prefix))
    parts.append("## Built-in parts\n\nA slot holds one of these, or an intervention's.\n")
    for kind, cls in built_in_parts():
        parts.append(f"### `{kind}`\n\n{doc_of(cls)}\n")
        parts.append(fields_table(cls))
    return "\n".join(parts)


def built_in_parts() -> list[tuple[str, type]]:
    from ablab.core.language.part import Part
    from ablab.core.recipe.intervention import REGISTRY

    known: dict[str, Any] = Part.known
    return [(kind, cls) for kind, cls in sorted(known.items()) if kind not in REGISTRY]


def runtime() -> str:
    from ablab.core.runtime.runtime import Runtime

    return (
        "# Runtime\n\nHow a run is executed, under `runtime:` in a sheet or as `runtime.device=cpu`. It is recorded "
        "with the run and never part of its identity.\n\n" + fields_table(Runtime, "runtime.")
    )


def designs() -> str:
    from ablab.ablations.design import DESIGNS

    parts = [
        "# Designs\n\nHow the ingredients under `with:` become arms, as `design: leave_one_out`.\n"
    ]
    for name, cls in DESIGNS.items():
        parts.append(f"## `{name}`\n\n{doc_of(cls)}\n")
        parts.append(fields_table(cls))
    return "\n".join(parts)


def interventions() -> str:
    from ablab.core.recipe.intervention import REGISTRY

    parts = [
        "# Interventions\n\nWhat `with:` may list: each with its control (what stands in its place where it is "
        "off), its source, the slots that it may touch, and its doses, as `{gating: {per: head}}`.\n"
    ]
    for name, made in sorted(REGISTRY.items()):
        cls: Any = made
        about = cls.about
        facts = [
            ("off", about.off),
            ("source", about.source),
            ("slots", ", ".join(f"`{path}`" for path in about.slots)),
            ("needs", ", ".join(about.requires)),
            ("never with", ", ".join(about.excludes)),
            ("at the start", "the same logits, bit for bit" if about.neutral_at_init else ""),
        ]
        parts.append(f"## `{name}`\n\n{about.summary}\n")
        parts.append("\n".join(f"- **{head}:** {says}" for head, says in facts if says) + "\n")
        if said := module_doc(cls):
            parts.append(said + "\n")
        parts.append(fields_table(cls))
    return "\n".join(parts)


def module_doc(cls: type) -> str:
    """Of a file that holds this intervention alone."""
    module = inspect.getmodule(cls)
    alone = module and sum(hasattr(one, "about") for one in vars(module).values()) == 1
    return doc_of(module) if alone else ""


def slots() -> str:
    from ablab.core.recipe.intervention import REGISTRY
    from ablab.core.recipe.slots import SLOTS

    about = {name: made.about for name, made in sorted(REGISTRY.items())}
    rows = []
    for slot in SLOTS:
        tenants = [name for name, one in about.items() if any(map(slot.covers, one.slots))]
        rows.append(
            (
                f"`{slot.path}`",
                "any number, in order" if slot.many else "exactly one",
                f"`{slot.signature}`",
                ", ".join(f"[{name}](interventions.md#{name})" for name in tenants),
            )
        )
    head = (
        "# Slots\n\nThe places of a recipe that hold parts. An intervention puts a part into one; two that choose one "
        "place of *exactly one* clash, by name.\n\n"
    )
    return head + table(("slot", "holds", "gets and returns", "interventions"), rows)


def commands() -> str:
    parts = [
        "# Commands\n\nEvery command and option, as `--help` says them. `ablab --version` says which ablab this is; "
        "`--debug` anywhere shows where an error was raised.\n\n"
        "Exit codes: 0 done; 1 runs failed, or ablab broke; 2 the request cannot be met as asked (one line says "
        "why); 130 interrupted.\n"
    ]
    for name, command in walk(application()):
        if isinstance(command.params, list) and not hasattr(command, "commands"):
            parts.append(f"## `ablab {name}`\n\n{(command.help or '').strip()}\n")
            rows = [(spelled(one), default_shown(one), help_of(one)) for one in command.params]
            parts.append(table(("argument or option", "default", "what it says"), rows))
    return "\n".join(parts)


def application() -> Any:
    from ablab.experiments.cli.main import app

    return typer.main.get_command(app)


def walk(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(words, command) of every command below."""
    for name, command in group.commands.items():
        yield " ".join((*path, name)), command
        if hasattr(command, "commands"):
            yield from walk(command, (*path, name))


def spelled(param: Any) -> str:
    if param.param_type_name == "argument":
        return f"`{(param.metavar or param.name).upper()}`"
    return ", ".join(f"`{one}`" for one in [*param.opts, *param.secondary_opts])


def default_shown(param: Any) -> str:
    if param.required:
        return "required"
    value = param.default
    if value is None or callable(value) or value in ((), [], False, ""):
        return ""
    return f"`{value}`"


def help_of(param: Any) -> str:
    return str(getattr(param, "help", None) or "")


def report() -> str:
    from ablab.analysis.effects import effect
    from ablab.analysis.pages.report import table as rows_of

    empty = effect.Effect("arm", None, effect.REFERENCE, "", 0, (), {}, None, None)
    columns = list(rows_of([empty])[0])
    parts = [
        "# The report\n\n`ablab report NAME` prints a row an arm; the page and the Markdown have the same columns, and "
        "a narrow terminal leaves some out.\n\n## Columns\n",
        table(("column", "what it says"), said("columns", columns)),
        "## Verdicts\n\nOf an ingredient; an arm without a sign in its name speaks of itself, as better or worse. "
        "[How they are reached](../verdicts.md).\n",
        table(("verdict", "what it says"), said("verdicts", verdict_words())),
        "## How a run ends\n",
        table(("status", "what it says"), said("statuses", status_words())),
    ]
    return "\n".join(parts)


def verdict_words() -> list[str]:
    from ablab.analysis.effects import effect

    names = (
        "HELPS HURTS EQUIVALENT INCONCLUSIVE INERT INADMISSIBLE TOO_FEW REFERENCE BETTER WORSE"
    )
    return [getattr(effect, name) for name in names.split()]


def status_words() -> list[str]:
    from ablab.core.store import result

    return [*result.STATUSES, result.INTERRUPTED, result.DAMAGED]


def said(what: str, names: list[str]) -> list[tuple[str, str]]:
    """Each name with its sentence of columns.yaml.  ValueError where that says more or less than the code has."""
    if unlike := set(names) ^ set(SAID[what]):
        raise ValueError(
            f"docs/columns.yaml, {what}: the code and the page differ in {sorted(unlike)}"
        )
    return [(name, SAID[what][name]) for name in names]


def api() -> str:
    from ablab import analysis
    from ablab.analysis import api as api_module

    parts = [
        "# The pandas API\n\n" + code(inspect.cleandoc(api_module.__doc__ or "")),
    ]
    for name in public_api():
        function = getattr(analysis, name)
        signature = re.sub(r"'([\w.]+)'", r"\1", str(inspect.signature(function)))
        parts.append(
            f"## `{name}`\n\n```python\n{name}{signature}\n```\n\n{doc_of(function)}\n"
        )
    return "\n".join(parts)


def public_api() -> list[str]:
    from ablab import analysis

    return [name for name in analysis.__all__ if inspect.isfunction(getattr(analysis, name))]


def experiments() -> str:
    from ablab.experiments.plan.sheets import catalog

    parts = [
        "# Registered experiments\n\n`ablab run NAME`; `ablab show NAME` prints the recipe of an arm.\n"
    ]
    for name, path in catalog().items():
        content = yaml.safe_load(path.read_text())
        lines = [str(content.get(key, "")).strip() for key in ("question", "time", "result")]
        parts.append(f"## {name}\n\n" + "\n\n".join(line for line in lines if line) + "\n")
        parts.append(f"```yaml\n{path.read_text().strip()}\n```\n")
    return "\n".join(parts)


def run_folder() -> str:
    """For files.md: the store and a run's folder, as the modules that write them say."""
    from ablab.core.store import record, store

    return "\n".join(_listed(doc_of(module)) for module in (store, record))


def _listed(said: str) -> str:
    """Text in which lines of a path and what it holds become a table."""
    rows = []
    text = []
    for line in said.splitlines():
        if pair := re.fullmatch(r"\s*(\S+)\s{2,}(.+)", line):
            path = pair[1].replace("\\", "")
            path = path.removeprefix("STORE/runs/ID/") or path
            rows.append((f"`{path}`", pair[2]))
        elif not line.startswith("    "):
            text.append(line)
    head, _, rest = "\n".join(text).replace("  No torch here.", "").partition("\n\n")
    return f"{head}\n\n{table(('file', 'what it holds'), rows)}\n{rest}\n"


def placed() -> str:
    """For own-cluster.md: the options of `ablab run` that say where its runs are executed."""
    known = dict(walk(application()))["run"].params
    names = ("jobs", "launcher", "gpus_per_run", "gpus-per-run", "deadline", "store", "plugins")
    rows = [(spelled(one), help_of(one)) for one in known if one.name in names]
    return table(("option of `ablab run`", "what it says"), rows)


def intervals() -> str:
    """For verdicts.md: which method gives an interval, as the module that computes it says."""
    from ablab.analysis.effects import intervals as methods

    return doc_of(methods)


GENERATED = {
    "reference/sheet.md": sheet,
    "reference/recipe.md": recipe,
    "reference/runtime.md": runtime,
    "reference/designs.md": designs,
    "reference/interventions.md": interventions,
    "reference/slots.md": slots,
    "reference/commands.md": commands,
    "reference/report.md": report,
    "reference/api.md": api,
    "reference/experiments.md": experiments,
}
HOUSE = ("architecture", "contributing", "changelog")  # pages of the repository's own root
MARKS = {
    "<!-- intervals -->": intervals,
    "<!-- run folder -->": run_folder,
    "<!-- places -->": placed,
}


# -- what mkdocs calls -------------------------------------------------------------------------------------------------
def on_files(files: Files, config: MkDocsConfig) -> Files:
    from ablab.ablations.registry import discover

    discover()
    for path, page in GENERATED.items():
        files.append(File.generated(config, path, content=page()))
    for name in HOUSE:
        text = (ROOT / f"{name.upper()}.md").read_text()
        files.append(File.generated(config, f"house/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    for mark, text in MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, text())
    return markdown
