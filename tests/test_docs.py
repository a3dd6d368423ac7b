"""The documentation says what is true: its commands run or are understood, its code runs, its links and names lead somewhere.

Commands of the generator, and whatever else is quick, run in a folder that looks like the checkout's root. The others go through
the very parser that they would meet, which then stops before the work. What can be neither is in NOT_RUN, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

# First words of a command -> why nothing is run or parsed.
NOT_RUN = {
    "git clone": "the repository's address is the reader's to know",
    "git lfs": "another program, and only for a broken checkout",
    "cd": "the shell's own",
    "export": "the shell's own",
    "sudo apt-get": "needs root; the packages are those that the Makefile's message names",
}
# Benchmarks and tools that take no arguments: there is nothing to parse.
WITHOUT_ARGUMENTS = {"benchmarks/generate.py", "benchmarks/responsiveness.py", "benchmarks/seam.py", "tools/lock.py"}
# Where each block of Python is run.
PYTHON_BLOCKS = {
    "README.md": "test_the_example_in_python_runs",
    "docs/blender.md": "test_the_script_of_blender_runs",
    "docs/editing.md": "test_the_keyframes_of_a_morph_are_set",
    "docs/panel.md": "tests/test_operators.py",
}
PYTHONS = {"python", "python3.11", ".venv/bin/python"}
SHELLS = {"sh", "bash"}


# Reading the pages


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(name_of(page), text.count("\n", 0, found.start()) + 1, found[1], found[2])


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def spans_of(page: Path) -> list[str]:
    """What stands between backticks in a page's text, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose_of(page))]


def commands_in(text: str) -> list[str]:
    """The commands of a block: comments and continued lines as the shell has them."""
    lines = text.replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if shlex.split(part, comments=True)]


def inline_commands(page: Path) -> Iterator[str]:
    """Commands in a page's text; [optional] parts are taken as given. One that is only named gets what makes it whole."""
    starts = r"(?:(?:\.venv/bin/)?python (?:-m \w+ |tools/|benchmarks/)|make [a-z]|blender --|benchmarks/\w+\.py|tools/\w+\.py .)"
    for span in spans_of(page):
        if not re.match(starts, span):
            continue
        command = re.sub(r"\[([^]]*)\]", r"\1", span).replace("...", "").strip()
        if re.fullmatch(r"make (?:generate|batch|train|clean)", command):
            command = command.replace("make", "make --dry-run")
        elif re.fullmatch(r"(?:\S*python -m|blender --background --command)(?: [a-z]\w*(?:-\w+)*)+", command):
            command += " --help"
        yield command


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL_BLOCKS = [block for block in BLOCKS if block.language in SHELLS]
COMMANDS = {command: block.page for block in SHELL_BLOCKS for command in commands_in(block.text)}
COMMANDS |= {command: name_of(page) for page in PAGES for command in inline_commands(page)}


def words_of(command: str) -> list[str]:
    """A command's words, without comments and without the variables set before it."""
    words = shlex.split(command, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return words


def is_not_run(words: list[str]) -> bool:
    return any(words[: len(start.split())] == start.split() for start in NOT_RUN)


# Parsing without working


class Parsed(BaseException):
    """The arguments were accepted; nothing was done. No Exception, so that no command takes it for a failure of its own."""


@pytest.fixture
def parse(monkeypatch) -> Callable[[Callable[[list[str]], int], list[str]], None]:
    """parse(main, arguments): a command's own parser accepts the arguments. The work that would follow is not begun."""
    import tyro

    def stopping(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapped(*arguments, **options):
            function(*arguments, **options)
            raise Parsed

        return wrapped

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(tyro, "cli", stopping(tyro.cli))

    def parse(main: Callable[[list[str]], int], arguments: list[str]) -> None:
        try:
            status = main(arguments)
        except Parsed:
            return
        except SystemExit as stop:
            assert stop.code == 0, f"refused: {arguments}"
        else:
            if status == 0 and "--help" in arguments:
                return
            pytest.fail(f"status {status} before anything was parsed: {arguments}")

    return parse


def script(path: str) -> Callable[[list[str]], int]:
    """A script as a function of its arguments."""

    def main(arguments: list[str]) -> int:
        before, sys.argv = sys.argv, [path, *arguments]
        sys.path.insert(0, str((ROOT / path).parent))
        try:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        finally:
            sys.argv = before
            sys.path.pop(0)
        return 0

    return main


@pytest.fixture
def recorded(tmp_path):
    """recorded(words of a make command): what its recipe would run. A stand-in for Python writes down its arguments."""
    record, program = tmp_path / "record", tmp_path / "recorder"
    program.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >> '{record}'\nprintf '\\n\\0' >> '{record}'\n")
    program.chmod(0o755)

    def run(words: list[str]) -> list[list[str]]:
        record.write_text("")
        # A path names the Python that makes environments, here the stand-in; "3.13" names one of Blender's.
        given = [word for word in words[1:] if not re.match(r"PYTHON=.*python", word)]
        python = [] if any(word.startswith("PYTHON=") for word in given) else [f"PYTHON={program}"]
        command = ["make", *given, *python, f"RUN={program}", "STAMP="]
        assert "clean" not in words or "--dry-run" in words
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"MAKEFLAGS": ""})
        assert result.returncode == 0, result.stderr
        runs = record.read_text(encoding="utf-8").split("\n\0")[:-1]
        return [arguments for run in runs if (arguments := run.split("\0")[:-1])[:1] != ["-c"]]

    return run


@pytest.fixture
def understood(parse, recorded, monkeypatch, capsys, extension):
    """understood(words): a command is accepted by the program that it starts."""
    import generator.__main__
    import trainer.__main__
    from generator.model.pipeline import GaussianAtlasPipeline

    modules = {"generator": generator.__main__.main, "trainer": trainer.__main__.main}
    # tools/picture.py looks at its arguments and then loads the model.
    monkeypatch.setattr(GaussianAtlasPipeline, "from_pretrained", classmethod(lambda *_, **__: (_ for _ in ()).throw(Parsed)))

    def python(words: list[str]) -> None:
        if words[0] != "-m":
            assert (ROOT / words[0]).is_file(), words[0]
            if words[0] == "tools/blender.py":
                parse(extension("blender_addon.batch").main, words[1:])
            elif words[0] in WITHOUT_ARGUMENTS:
                assert len(words) == 1 and "parse_args" not in (ROOT / words[0]).read_text(encoding="utf-8")
            else:
                parse(script(words[0]), words[1:])
        elif words[1] in modules:
            parse(modules[words[1]], words[2:])
        elif words[1] == "pip":
            assert words[2] in ("install", "uninstall")
        else:
            assert words[1] in ("pytest", "ruff", "mypy")

    def understood(words: list[str]) -> None:
        if words[0] in PYTHONS:
            python(words[1:])
        elif words[0].endswith(".py"):
            python(words)
        elif words[0] == "make":
            known = (ROOT / "Makefile").read_text(encoding="utf-8")
            for variable in (word.partition("=")[0] for word in words[1:] if "=" in word):
                assert re.search(rf"\b{variable}\b", known), f"the Makefile knows no {variable}"
            for arguments in recorded(words):
                python(arguments)
        elif words[0] == "blender":
            at = words.index("--command")
            assert words[at + 1] == "gaussian_atlas" and set(words[1:at]) <= {"--background", "--online-mode"}
            parse(extension("blender_addon.batch").main, words[at + 2 :])
        elif words[0] == "torchrun":
            from torch.distributed.run import get_args_parser

            options = get_args_parser().parse_known_args(words[1:])[0]
            assert options.module
            python(["-m", options.training_script, *options.training_script_args])
        elif words[:2] == ["ray", "start"]:
            from ray.scripts.scripts import start

            start.make_context("ray start", words[2:])
        else:
            pytest.fail(f"nobody checks this command: {words}")
        capsys.readouterr()

    return understood


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{page}: {command}" for command, page in COMMANDS.items()])
def test_a_command_is_understood(command, understood):
    words = words_of(command)
    if is_not_run(words):
        pytest.skip(next(reason for start, reason in NOT_RUN.items() if words[: len(start.split())] == start.split()))
    understood(words)


def test_a_wrong_command_is_not_understood(understood, capsys):
    """The checks above can fail."""
    for command in (
        "python -m generator convert a.ply b.spz --output-axes down",
        "python -m trainer farm --preset starter --fit.no-such-setting 3",
        "python -m trainer scale runs/x --object 3 --bogus",
        "make no-such-target",
        "make generate PROMPT=x SEEDS=3",
        "benchmarks/render.py --counts 5",
        "tools/picture.py nothing",
        "blender --background --command gaussian_atlas convert a.ply",
        "ray start --heads",
        "rm -rf out",
    ):
        with pytest.raises(BaseException) as caught:
            understood(words_of(command))
        assert not isinstance(caught.value, (Parsed, KeyboardInterrupt)), command


def test_what_is_not_run_is_there_and_few():
    starts = [
        words_of(command)
        for command in [*COMMANDS, *(span for page in PAGES for span in spans_of(page) if span.strip())]
        if _splits(command)
    ]
    for start in NOT_RUN:
        assert any(words[: len(start.split())] == start.split() for words in starts), f"{start}: no page has it any more"
    assert len(NOT_RUN) <= 8


def _splits(text: str) -> bool:
    try:
        return bool(shlex.split(text, comments=True))
    except ValueError:
        return False


def test_files_that_commands_name_are_there():
    for command, page in COMMANDS.items():
        for word in words_of(command):
            if re.match(r"(benchmarks|tools|models|docs|tests|trainer|generator)/", word):
                assert (ROOT / word).exists(), f"{page}: {command}"


# Running


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder that commands see as the checkout's root, with what a reader of the pages has by then."""
    from generator.__main__ import main

    folder = tmp_path_factory.mktemp("checkout")
    for name in ("models", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "prompts.txt").write_text("a red armchair\n")
    (folder / "runs" / "starter").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "scale" / "starter.jsonl", folder / "runs" / "starter" / "records.jsonl")
    assert main(["a red armchair", "--steps", "4", "--output", str(folder / "armchair.ply")]) == 0
    for name in ("chair.ply", "scan.ply"):
        shutil.copy(folder / "armchair.ply", folder / name)
    return folder


@pytest.fixture
def inside(checkout, monkeypatch) -> Path:
    monkeypatch.chdir(checkout)
    return checkout


def quick(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, its arguments) of a command that takes seconds and needs nothing but what `checkout` has; else None."""
    if words[0] not in PYTHONS or words[1] != "-m" or "runs/mine/bundle" in words:
        return None
    module, arguments = words[2], words[3:]
    if module == "generator":
        # Few steps: what is tried is the command.
        makes = arguments[0] not in ("info", "convert") and "--help" not in arguments
        return module, [*arguments, "--steps", "2"] if makes and "--steps" not in arguments else arguments
    # Without a number it simulates ten million objects; tests/test_scale.py has these.
    return (module, arguments) if module == "trainer" and arguments[0] == "scale" and "--objects" in arguments else None


QUICK = [command for command in COMMANDS if not is_not_run(words_of(command)) and quick(words_of(command))]


@pytest.mark.parametrize("command", QUICK, ids=[f"{COMMANDS[command]}: {command}" for command in QUICK])
def test_a_quick_command_runs(command, inside, capsys):
    import generator.__main__
    import trainer.__main__

    module, arguments = quick(words_of(command))
    try:
        status = {"generator": generator.__main__.main, "trainer": trainer.__main__.main}[module](arguments)
    except SystemExit as stop:  # --help
        status = stop.code
    assert status == 0, capsys.readouterr().err
    for option, file in zip(arguments, arguments[1:], strict=False):
        assert option not in ("--output", "--preview") or (inside / file).stat().st_size > 0
    if arguments[0] == "convert" and "--help" not in arguments:
        assert (inside / arguments[2]).stat().st_size > 0


def test_quick_commands_are_many():
    assert len(QUICK) >= 8


# A mesh takes seconds: tests/test_mesh.py has them.
CONVERSIONS = [command for command in COMMANDS if re.match(r"blender .* (convert|models)\b(?!.*\.glb| (install|remove))", command)]


@pytest.mark.parametrize("command", CONVERSIONS)
def test_a_quick_command_of_the_extension_runs(command, bpy, extension, inside, capfd):
    words = words_of(command)
    arguments = words[words.index("gaussian_atlas") + 1 :]
    assert extension("blender_addon.batch").main(arguments) == 0, capfd.readouterr().err
    assert arguments[0] != "convert" or (inside / arguments[2]).stat().st_size > 0


# Python


def python_block(page: str) -> str:
    (block,) = [block for block in BLOCKS if block.language == "python" and block.page == page]
    return block.text


def test_every_block_of_python_is_run_somewhere():
    assert {block.page for block in BLOCKS if block.language == "python"} == set(PYTHON_BLOCKS)
    for place in PYTHON_BLOCKS.values():
        assert place in globals() or (ROOT / place).is_file()


def test_the_example_in_python_runs(tmp_path, monkeypatch):
    from generator.formats import load

    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    exec(compile(python_block("README.md"), "README.md", "exec"), {})
    assert len(load("armchair.ply")) == 4096


def test_the_script_of_blender_runs(bpy, fake_model, inside):
    exec(compile(python_block("docs/blender.md"), "docs/blender.md", "exec"), {})
    assert [call["prompt"] for call in fake_model.pipeline.calls] == ["a red armchair"]
    assert (inside / "armchair.spz").stat().st_size > 0
    assert {object.type for object in bpy.data.objects} == {"POINTCLOUD", "MESH"}


def test_the_keyframes_of_a_morph_are_set(bpy, extension, inside):
    for _ in range(2):
        bpy.ops.gaussian_atlas.import_splats(filepath="scan.ply")
    for object in bpy.data.objects:
        object.select_set(True)
    bpy.ops.gaussian_atlas.morph(factor=0.0)
    object = bpy.context.active_object
    exec(compile(python_block("docs/editing.md"), "docs/editing.md", "exec"), {"object": object})
    inputs, morph = extension("blender_addon.splat_object.inputs"), extension("blender_addon.splat_object.morph")
    modifier = morph.modifier_of(object)
    (curve,) = [curve for curve in inputs.curves(object) if curve.data_path == inputs.data_path(modifier, "Factor")]
    assert [tuple(point.co) for point in curve.keyframe_points] == [(1, 0), (50, 1)]


def calls(name: str) -> Iterator[ast.Call]:
    """Calls of a dotted name in the pages' text: `pipe("a lamp", seed=7)`."""
    for page in PAGES:
        for span in spans_of(page):
            if re.match(rf"{re.escape(name)}[\w.]*\(.*\)$", span):
                yield ast.parse(span, mode="eval").body


def test_operators_have_the_arguments_that_are_named(bpy):
    found = list(calls("bpy.ops.gaussian_atlas."))
    assert len(found) >= 4
    for call in found:
        known = getattr(bpy.ops.gaussian_atlas, call.func.attr).get_rna_type().properties.keys()
        assert {keyword.arg for keyword in call.keywords} <= set(known), ast.unparse(call)


def test_the_pipeline_has_the_arguments_that_are_named():
    import inspect

    from generator import GaussianAtlasPipeline

    found = [call for call in calls("pipe") if isinstance(call.func, ast.Name)]
    assert found
    for call in found:
        inspect.signature(GaussianAtlasPipeline.__call__).bind(None, *call.args, **{keyword.arg: None for keyword in call.keywords})


# Links, names and quotations


def anchors_of(page: Path) -> set[str]:
    """Anchors as code hosts make them of headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{name_of(page)}: {link}"
        assert not anchor or anchor in anchors_of(target), f"{name_of(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_are_there(page):
    folders = "benchmarks|tools|trainer|generator|blender_addon|tests|models|docs"
    for span in spans_of(page):
        if re.fullmatch(rf"(?:{folders})/[\w./*-]*", span) and span != "benchmarks/results/":
            assert list(ROOT.glob(span)), f"{name_of(page)}: {span}"


@functools.cache
def defined(path: Path) -> set[str]:
    """Every name that a module gives a meaning."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_names_that_are_said_to_be_in_a_file_are():
    pairs = {pair for page in PAGES for pair in re.findall(r"`(\w+)`\s+(?:in|of)\s+`([\w/]+\.py)`", prose_of(page))}
    assert len(pairs) > 15
    assert not {f"{name} in {path}" for name, path in pairs if name not in defined(ROOT / path)}


def test_tests_that_are_named_exist():
    known = set().union(*(defined(path) for path in (ROOT / "tests").glob("test_*.py")))
    named = {span for page in PAGES for span in spans_of(page) if re.fullmatch(r"test_\w+", span)}
    assert named and not named - known


def test_errors_that_are_quoted_are_the_programs():
    """Of every message in the first column of the troubleshooting tables, what stands between the dots is in the code."""
    sources = [path for folder in ("generator", "blender_addon", "trainer", "tools") for path in (ROOT / folder).rglob("*.py")]
    constants = [
        node.value
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    said = "\0".join([*constants, (ROOT / "Makefile").read_text(encoding="utf-8")])
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`[^|]*`[^|]*) \|", text, re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 20
    for message in messages:
        for piece in message.split("..."):
            assert piece.strip(" ():;,") in said, f"{message}: nothing says {piece!r}"


def test_the_model_card_is_the_models():
    bundle = json.loads((ROOT / "models" / "starter" / "bundle.json").read_text(encoding="utf-8"))
    card = (ROOT / "docs" / "model-card.md").read_text(encoding="utf-8")
    size = bundle["atlas"]["size"]
    for fact in (f"`{bundle['name']}`", bundle["licence"], f"{bundle['atlas']['gaussians']:,} Gaussians", f"{size} x {size} cells"):
        assert fact in card, f"the model card does not say {fact}"


# The site


def test_every_page_is_in_the_navigation():
    hooks = ast.parse((ROOT / "tools" / "site_hooks.py").read_text(encoding="utf-8"))
    (outside,) = [ast.literal_eval(node.value) for node in hooks.body if isinstance(node, ast.Assign) and node.targets[0].id == "OUTSIDE"]
    assert all((ROOT / source).is_file() for source in outside)
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} | {page for page in outside.values() if page.endswith(".md")}
    listed = re.findall(r"^\s*- (?:[\w ]+: )?([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(pages)


def test_the_site_builds_strictly(tmp_path):
    python = ROOT / ".venv-docs" / "bin" / "python"
    if not python.exists():
        pytest.skip("`make docs` has not made its environment here")
    command = [str(python), "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = (tmp_path / "site" / "architecture.html").read_text(encoding="utf-8")
    assert drawn.count('class="mermaid"') >= 2
