"""Open a real Blender window on a virtual screen, drive the panel as a person would, and keep screenshots.

    python tools/window.py --out out/window [--blender PATH] [--extension ZIP] [--steps 8]

Needs Blender and Xvfb. Without --extension the checkout runs, on packages that Blender's own Python must then have. Every
claim that is checked is printed with "ok" or "FAILED"; the exit status is 1 where one failed, 2 where it cannot run here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 1280, 800
# Solver steps where something has to happen while it runs, also on a fast machine.
LONG = 300
LIMIT_SECONDS = 900


def missing(blender: str | None) -> str:
    """Why no window can be opened here; empty where one can."""
    for program, found in (("blender", blender or shutil.which("blender")), ("Xvfb", shutil.which("Xvfb"))):
        if not found:
            return f"{program} is not on PATH"
    return ""


def read_screen(path: Path) -> tuple[int, int, bytes]:
    """Width, height and RGB bytes of an X window dump of 32 bits a pixel, as Xvfb keeps its screen (XWDFile.h)."""
    data = path.read_bytes()
    fields = struct.unpack(">25I", data[:100])
    header, width, height, order, bits, stride, colors = fields[0], fields[4], fields[5], fields[7], fields[11], fields[12], fields[19]
    if bits != 32:
        raise ValueError(f"{path}: {bits} bits a pixel, 32 are read")
    start = header + 12 * colors
    red, green, blue = (2, 1, 0) if order == 0 else (1, 2, 3)
    rows = []
    for y in range(height):
        row = data[start + y * stride : start + y * stride + 4 * width]
        rgb = bytearray(3 * width)
        rgb[0::3], rgb[1::3], rgb[2::3] = row[red::4], row[green::4], row[blue::4]
        rows.append(bytes(rgb))
    return width, height, b"".join(rows)


def write_png(path: Path, width: int, height: int, rgb: bytes) -> None:
    """An image without any imaging library: this runs in any Python."""
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    lines = b"".join(b"\0" + rgb[3 * width * y : 3 * width * (y + 1)] for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b""))


def open_window(out: Path, blender: str, extension: Path | None = None, steps: int = 8, only: list[str] | None = None) -> dict:
    """Run `Drive` in a Blender on a screen of its own; returns what it wrote: checks, seconds, screenshots.

    Raises:
        RuntimeError: the screen or Blender did not come up, or Blender ended before the end.
    """
    sys.path.insert(0, str(ROOT / "tools"))
    from blender import EXTENSION, REPOSITORY, install, link_extension

    out.mkdir(parents=True, exist_ok=True)
    result = out / "window.json"
    result.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gaussian-atlas-window-") as folder:
        work = Path(folder)
        screen = work / "screen"
        screen.mkdir()
        user = work / "user"
        environment = os.environ | {"BLENDER_USER_RESOURCES": str(user), "LIBGL_ALWAYS_SOFTWARE": "1"}
        if extension:
            user.mkdir()
            install(blender, extension, environment)
        else:
            link_extension(user)
        reader, writer = os.pipe()
        geometry = f"{WIDTH}x{HEIGHT}x24"
        command = ["Xvfb", "-displayfd", str(writer), "-screen", "0", geometry, "-fbdir", str(screen), "-nolisten", "tcp"]
        xvfb = subprocess.Popen(command, pass_fds=[writer], stderr=subprocess.DEVNULL)
        os.close(writer)
        try:
            number = os.read(reader, 16).decode().strip()
            if not number:
                raise RuntimeError("Xvfb did not start")
            environment |= {"DISPLAY": f":{number}"}
            plan = {
                "out": str(out),
                "screen": str(screen / "Xvfb_screen0"),
                "steps": steps,
                "only": only,
                "module": f"bl_ext.{REPOSITORY}.{EXTENSION}",
            }
            (work / "plan.json").write_text(json.dumps(plan))
            options = [
                "--factory-startup",
                "--enable-event-simulate",
                "--no-window-focus",
                "--window-geometry",
                "0",
                "0",
                *map(str, (WIDTH, HEIGHT)),
            ]
            command = [blender, *options, "--python", str(Path(__file__).resolve()), "--", "--inside", str(work / "plan.json")]
            with open(out / "blender.log", "w") as log:
                done = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=LIMIT_SECONDS)
        finally:
            xvfb.terminate()
            xvfb.wait()
            os.close(reader)
        if not result.is_file():
            raise RuntimeError(f"Blender ended before the end (status {done.returncode}):\n{(out / 'blender.log').read_text()[-3000:]}")
        return json.loads(result.read_text())


class Drive:
    """What is done in the window, as a generator that yields the seconds until it goes on; runs inside Blender."""

    def __init__(self, plan: dict) -> None:
        import bpy

        self.bpy = bpy
        self.plan = plan
        self.out = Path(plan["out"])
        self.result = {"blender": bpy.app.version_string, "checks": [], "screenshots": [], "seconds": {}}
        self.script = self.steps()

    def tick(self) -> float | None:
        """Called by Blender's timer."""
        try:
            return next(self.script)
        except StopIteration:
            self.end()
        except Exception as error:
            import traceback

            traceback.print_exc()
            self.check(f"{type(error).__name__}: {error}", False)
            self.end()
        return None

    def end(self) -> None:
        (self.out / "window.json").write_text(json.dumps(self.result, indent=1))
        sys.stdout.flush()
        self.bpy.ops.wm.quit_blender()

    def check(self, claim: str, true: object) -> None:
        print(("ok      " if true else "FAILED  ") + claim, flush=True)
        self.result["checks"].append({"claim": claim, "ok": bool(true)})

    def shot(self, name: str) -> None:
        path = self.out / f"{name}.png"
        write_png(path, *read_screen(Path(self.plan["screen"])))
        self.result["screenshots"].append(str(path))

    def colored_shot(self, name: str):
        """A screenshot in the Material Preview, by the panel's button, without the outlines of what is selected."""
        with self.bpy.context.temp_override(window=self.window, area=self.view, region=self.region("UI")):
            self.bpy.ops.gaussian_atlas.show_colors()
        space = self.view.spaces[0]
        self.check("the button shows colours", space.shading.type == "MATERIAL")
        space.overlay.show_outline_selected = False
        yield 30.0  # EEVEE compiles its shaders and samples, on the processor
        self.shot(name)
        space.overlay.show_outline_selected = True
        space.shading.type = "SOLID"
        yield 1.0

    # The window

    @property
    def window(self):
        return self.bpy.context.window_manager.windows[0]

    @property
    def view(self):
        return next(area for area in self.window.screen.areas if area.type == "VIEW_3D")

    def region(self, kind: str):
        return next(region for region in self.view.regions if region.type == kind)

    def press(self, kind: str, x: int, y: int, **modifiers: bool) -> None:
        """A key or mouse button, down and up, where the pointer is at (x, y) pixels from the window's lower left."""
        self.window.event_simulate(type="MOUSEMOVE", value="NOTHING", x=x, y=y)
        for value in ("PRESS", "RELEASE"):
            self.window.event_simulate(type=kind, value=value, x=x, y=y, **modifiers)

    def press_in_view(self, kind: str, **modifiers: bool) -> None:
        region = self.region("WINDOW")
        self.press(kind, region.x + region.width // 3, region.y + region.height // 3, **modifiers)

    def call(self, operator, **arguments):
        """An operator as a button of the sidebar calls it."""
        with self.bpy.context.temp_override(window=self.window, area=self.view, region=self.region("UI")):
            return operator("INVOKE_DEFAULT", True, **arguments)

    def module(self, name: str):
        return sys.modules[f"{self.plan['module']}.blender_addon.{name}"]

    @property
    def settings(self):
        return self.window.scene.gaussian_atlas

    @property
    def status(self):
        return self.bpy.context.window_manager.gaussian_atlas

    def clouds(self) -> list[str]:
        return sorted(object.name for object in self.bpy.data.objects if object.type == "POINTCLOUD")

    def until(self, condition, what: str, seconds: float = 300.0):
        started = time.monotonic()
        while not condition():
            if time.monotonic() - started > seconds:
                raise RuntimeError(f"{what}: not within {seconds:g} s")
            yield 0.05
        self.result["seconds"][what] = round(time.monotonic() - started, 2)

    def running(self) -> bool:
        return self.module("operators.base").running()

    # What is driven

    SCENES = (
        "cancel",
        "generate_and_undo",
        "grid",
        "undo_while_it_runs",
        "error_with_its_fix",
        "two_windows",
        "open_a_file_while_it_runs",
        "disable_while_it_runs",
    )

    def steps(self):
        yield from self.prepare()
        for scene in self.plan["only"] or self.SCENES:
            yield from getattr(self, scene)()

    def prepare(self):
        bpy = self.bpy
        import addon_utils

        yield 1.0
        if self.plan["module"] not in bpy.context.preferences.addons:
            addon_utils.enable(self.plan["module"], default_set=True)
        card = bpy.types.GAUSSIAN_ATLAS_PT_model  # open from the start, for the picture
        bpy.utils.unregister_class(card)
        card.bl_options = set()
        bpy.utils.register_class(card)
        self.press_in_view("ESC")  # the splash screen
        yield 1.0
        for name in ("Cube", "Camera", "Light"):
            bpy.data.objects.remove(bpy.data.objects[name])
        self.view.spaces[0].show_region_ui = True
        self.view.spaces[0].region_3d.view_distance = 4.0
        yield 1.0
        sidebar = self.region("UI")
        for y in range(sidebar.height - 40, 40, -30):  # the tabs at its right border, from the top
            self.press("LEFTMOUSE", sidebar.x + sidebar.width - 10, sidebar.y + y)
            yield 0.3
            if sidebar.active_panel_category == "Gaussian Atlas":
                break
        self.check("the tab is there and opens", sidebar.active_panel_category == "Gaussian Atlas")
        self.settings.prompt = "a red armchair"
        self.settings.steps = self.plan["steps"]
        bpy.ops.ed.undo_push(message="Prepared")
        self.region("UI").tag_redraw()
        yield 1.0
        self.shot("panel")

    def cancel(self):
        overlay = self.module("overlay")
        self.settings.steps = LONG
        self.check("generating starts and returns at once", self.call(self.bpy.ops.gaussian_atlas.generate) == {"RUNNING_MODAL"})
        yield from self.until(overlay.shown, "the first look at the object, model loading included")
        yield 1.0
        self.shot("progress")
        self.check("progress is shown", self.status.running and self.status.stage.startswith("Sampling"))
        self.press_in_view("ESC")
        yield from self.until(lambda: not self.running(), "Esc to stopped", 60)
        yield 0.5
        self.check("after Esc nothing is left", not self.clouds() and not overlay.shown() and not self.status.error)
        self.settings.steps = self.plan["steps"]

    def generate_and_undo(self):
        self.call(self.bpy.ops.gaussian_atlas.generate)
        yield from self.until(lambda: not self.running(), "one object, model loaded")
        yield 1.0
        yield from self.colored_shot("object")
        self.check("the object is there, selected", self.clouds() == ["a red armchair"] and self.bpy.context.view_layer.objects.active)
        self.press_in_view("Z", ctrl=True)
        yield 1.0
        self.check("Ctrl Z takes it away", self.clouds() == [])
        self.press_in_view("Z", ctrl=True, shift=True)
        yield 1.0
        self.check("Ctrl Shift Z brings it back", self.clouds() == ["a red armchair"])
        self.press_in_view("Z", ctrl=True)
        yield 1.0

    def grid(self):
        overlay = self.module("overlay")
        self.settings.count = 4
        view = self.view.spaces[0].region_3d
        view.view_location, view.view_distance = (1.1, 0.2, 0.0), 6.0
        self.call(self.bpy.ops.gaussian_atlas.generate)
        yield from self.until(lambda: len(overlay.shown()) == 3 or not self.running(), "two of four done")
        yield 0.5
        self.shot("grid-progress")
        yield from self.until(lambda: not self.running(), "the grid")
        yield 1.0
        yield from self.colored_shot("grid")
        self.check("four objects are there", len(self.clouds()) == 4)
        self.press_in_view("Z", ctrl=True)
        yield 1.0
        self.check("one Ctrl Z takes the grid away", self.clouds() == [])
        self.settings.count = 1
        view.view_location, view.view_distance = (0.0, 0.0, 0.0), 4.0

    def undo_while_it_runs(self):
        bpy = self.bpy
        bpy.data.objects.new("marker", None)
        bpy.context.scene.collection.objects.link(bpy.data.objects["marker"])
        bpy.ops.ed.undo_push(message="Marker")
        self.settings.steps = 40
        self.call(bpy.ops.gaussian_atlas.generate)
        yield from self.until(self.module("overlay").shown, "a look at the object")
        self.press_in_view("Z", ctrl=True)
        yield 1.0
        self.check("Ctrl Z while it runs undoes what was before", "marker" not in bpy.data.objects)
        self.press_in_view("Z", ctrl=True, shift=True)
        yield 0.5
        yield from self.until(lambda: not self.running(), "the object in spite of undo and redo")
        yield 0.5
        self.check("and the object comes", self.clouds() == ["a red armchair"])

    def error_with_its_fix(self):
        bpy = self.bpy
        preferences = bpy.context.preferences.addons[self.plan["module"]].preferences
        preferences.model_path = "/models/lost"
        # Blender's own message opens where the pointer is: away from the panel.
        self.window.event_simulate(type="MOUSEMOVE", value="NOTHING", x=WIDTH // 4, y=HEIGHT // 4)
        yield 0.5
        try:
            self.call(bpy.ops.gaussian_atlas.generate)
        except RuntimeError:  # reported as an error, which a script sees as an exception
            pass
        yield from self.until(lambda: not self.running(), "an error")
        yield 0.5
        self.check("an error is a sentence with a button", self.status.error and self.status.fix_operator)
        self.shot("error")
        group, _, name = self.status.fix_operator.partition(".")
        self.call(getattr(getattr(bpy.ops, group), name))
        self.check("the button mends it", not self.status.error and not preferences.model_path)

    def two_windows(self):
        bpy = self.bpy
        with bpy.context.temp_override(window=self.window):
            bpy.ops.wm.window_new_main()
        yield 2.0
        second = bpy.context.window_manager.windows[1]
        area = next(area for area in second.screen.areas if area.type == "VIEW_3D")
        region = next(region for region in area.regions if region.type == "UI")
        self.settings.steps = LONG
        with bpy.context.temp_override(window=second, area=area, region=region):
            bpy.ops.gaussian_atlas.generate("INVOKE_DEFAULT", True)
        yield 2.0
        self.check("it runs from a second window", self.running())
        with bpy.context.temp_override(window=second):
            bpy.ops.wm.window_close()
        yield 2.0
        self.check("closing that window stops it", not self.running() and not self.module("overlay").shown())
        self.settings.steps = self.plan["steps"]

    def open_a_file_while_it_runs(self):
        bpy = self.bpy
        path = str(self.out / "saved.blend")
        self.settings.steps = LONG
        self.call(bpy.ops.gaussian_atlas.generate)
        yield from self.until(self.module("overlay").shown, "a look before the file is saved")
        before = self.clouds()
        with bpy.context.temp_override(window=self.window):
            bpy.ops.wm.save_as_mainfile(filepath=path, copy=True)
        bpy.ops.wm.open_mainfile(filepath=path)  # without the override: its window is gone afterwards
        yield 2.0
        self.check("opening a file stops it", not self.running() and not self.module("overlay").shown() and not self.status.running)
        self.check("nothing of it was saved", self.clouds() == before)

    def disable_while_it_runs(self):
        import addon_utils

        self.settings.steps = LONG
        self.call(self.bpy.ops.gaussian_atlas.generate)
        yield from self.until(self.module("overlay").shown, "a look before it is disabled")
        addon_utils.disable(self.plan["module"])
        yield 2.0
        self.check("disabling the extension while it runs", not hasattr(self.bpy.types.Scene, "gaussian_atlas"))
        addon_utils.enable(self.plan["module"])
        yield 1.0
        self.check("and enabling it again", hasattr(self.bpy.types.Scene, "gaussian_atlas") and not self.running())


def _inside(plan: str) -> None:
    import bpy

    drive = Drive(json.loads(Path(plan).read_text()))
    bpy.app.timers.register(drive.tick, first_interval=1.0, persistent=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/window", metavar="DIR", help="folder of the screenshots (default: out/window)")
    parser.add_argument("--blender", default=os.environ.get("BLENDER") or None, metavar="PATH", help="default: the one on PATH")
    parser.add_argument("--extension", metavar="ZIP", help="install this zip; default: the checkout")
    parser.add_argument("--only", nargs="+", choices=Drive.SCENES, metavar="SCENE", help=f"some of: {', '.join(Drive.SCENES)}")
    parser.add_argument("--steps", type=int, default=8, help="solver steps of each object (default: 8)")
    options = parser.parse_args()
    if why := missing(options.blender):
        print(f"tools/window.py: {why}", file=sys.stderr)
        return 2
    extension = Path(options.extension).resolve() if options.extension else None
    try:
        result = open_window(
            Path(options.out).resolve(), options.blender or shutil.which("blender"), extension, options.steps, options.only
        )
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        print(f"tools/window.py: {error}", file=sys.stderr)
        return 1
    print(f"Blender {result['blender']}")
    for check in result["checks"]:
        print(("ok      " if check["ok"] else "FAILED  ") + check["claim"])
    for what, seconds in result["seconds"].items():
        print(f"{seconds:7.2f} s  {what}")
    print("\n".join(result["screenshots"]))
    return 0 if all(check["ok"] for check in result["checks"]) else 1


if __name__ == "__main__":
    if "--inside" in sys.argv:
        _inside(sys.argv[sys.argv.index("--inside") + 1])
    else:
        sys.exit(main())
