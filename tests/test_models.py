"""Installing models: whole or not at all, and nothing that could harm."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest


@pytest.fixture
def models(extension):
    return extension("blender_addon.models")


@pytest.fixture
def errors(extension):
    return extension("generator.errors")


def silent(*news):
    pass


def make(folder, files=None, **changes):
    """A folder that has what installing looks at: listed files with their true sizes and hashes."""
    files = (
        {"unet/weights.safetensors": bytes(range(256)) * 5000, "unet/config.json": b"{}", "CREDITS.md": b"all"} if files is None else files
    )
    entries = {}
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        entries[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    folder.mkdir(exist_ok=True)
    bundle = {"format": "gaussian-atlas-bundle-1", "name": "Test Model", "version": "1.0", "licence": "CC0-1.0", "files": entries} | changes
    (folder / "bundle.json").write_text(json.dumps(bundle))
    return folder


def pack(folder, path, top=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, top + file.relative_to(folder).as_posix())
    return path


def install(models, source, place, **options):
    return models.install(str(source), place, silent, threading.Event(), **options)


def left_in(place):
    return sorted(path.name for path in place.iterdir()) if place.is_dir() else []


@pytest.mark.parametrize("how", ["folder", "zip", "zip of the folder"])
def test_a_model_is_installed_listed_and_removed(models, tmp_path, how):
    source, place = make(tmp_path / "source"), tmp_path / "models"
    (source / "notes.bin").write_bytes(b"not listed")
    if how != "folder":
        source = pack(source, tmp_path / "model.zip", "" if how == "zip" else "source/")
    model = install(models, source, place)
    assert model.name.startswith("test-model-1.0-") and model.info.title == "Test Model 1.0"
    files = sorted(path.relative_to(model.folder).as_posix() for path in model.folder.rglob("*") if path.is_file())
    assert files == ["CREDITS.md", "bundle.json", "unet/config.json", "unet/weights.safetensors"], "what is listed and nothing else"
    assert [entry.name for entry in models.installed(place) if entry.name != models.STARTER] == [model.name]
    assert install(models, source, place) == model and left_in(place) == [model.name], "again: the same place"
    models.remove(model.name, place)
    assert left_in(place) == []


def spoil(source, how):
    weights = source / "unet" / "weights.safetensors"
    bundle = json.loads((source / "bundle.json").read_text())
    entry = bundle["files"]["unet/weights.safetensors"]
    match how:
        case "altered":
            weights.write_bytes(b"x" + weights.read_bytes()[1:])
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "longer":
            weights.write_bytes(weights.read_bytes() + b"x")
        case "missing":
            weights.unlink()
        case "pickle":
            bundle["files"]["unet/weights.bin"] = entry
        case "python":
            bundle["files"]["pipeline.py"] = entry
        case "outside":
            bundle["files"]["../outside.json"] = entry
        case "absolute":
            bundle["files"]["/etc/outside.json"] = entry
        case "backslash":
            bundle["files"]["..\\outside.json"] = entry
        case "drive":
            bundle["files"]["C:/outside.json"] = entry
        case "huge":
            entry["size"] = 10**15
        case "disk":
            entry["size"] = 60 * 2**30
        case "negative":
            entry["size"] = -1
        case "no hash":
            del entry["sha256"]
        case "itself":
            bundle["files"]["bundle.json"] = entry
        case "twice":
            bundle["files"]["unet/WEIGHTS.safetensors"] = entry
        case "format":
            bundle["format"] = "gaussian-atlas-bundle-9"
        case "nothing":
            bundle["files"] = {}
        case "list":
            bundle = []
    (source / "bundle.json").write_text(json.dumps(bundle))


SPOILED = {
    "altered": "SHA-256", "truncated": "recorded", "longer": "recorded", "missing": "missing", "pickle": "plain data",
    "python": "plain data",
    "outside": "not a name", "absolute": "not a name", "backslash": "not a name", "drive": "not a name", "huge": "more than",
    "disk": "GB free", "negative": "size and sha256", "no hash": "size and sha256", "itself": "twice", "twice": "twice",
    "format": "another format", "nothing": "lists 0 files", "list": "not a readable",
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", SPOILED)
def test_a_damaged_or_hostile_model_is_refused_and_leaves_nothing(models, errors, tmp_path, how, packed, monkeypatch):
    if how == "disk":
        usage = type("Usage", (), {"free": 10**9})
        monkeypatch.setattr(models.shutil, "disk_usage", lambda path: usage)
    source, place = make(tmp_path / "source"), tmp_path / "models"
    good = install(models, make(tmp_path / "good", name="Good"), place)
    spoil(source, how)
    with pytest.raises(errors.InputError, match=SPOILED[how]) as caught:
        install(models, pack(source, tmp_path / "model.zip") if packed else source, place)
    assert len(str(caught.value).splitlines()) == 1
    assert left_in(place) == [good.name]
    assert not (tmp_path / "outside.json").exists()


@pytest.mark.parametrize("spoilt", ['{"name": "a", "files": {"b": {"size": 1e999}}}', '{"name": ' + "[" * 200_000])
def test_a_description_that_cannot_be_read_is_named(extension, errors, tmp_path, spoilt):
    (tmp_path / "bundle.json").write_text(spoilt)
    with pytest.raises(errors.InputError, match="not a readable model description"):
        extension("blender_addon.service").describe(tmp_path)


def test_hostile_zips_are_refused(models, errors, tmp_path):
    source, place = make(tmp_path / "source"), tmp_path / "models"
    link = zipfile.ZipInfo("unet/link.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for name, message in (
        ("../outside.json", "leads out"),
        ("/outside.json", "leads out"),
        ("a\\..\\..\\b.json", "leads out"),
        (link, "is a link"),
    ):
        path = pack(source, tmp_path / "model.zip")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, "/etc/passwd")
        with pytest.raises(errors.InputError, match=message):
            install(models, path, place)
    for content in (b"", b"no zip at all", pack(source, tmp_path / "cut.zip").read_bytes()[:3000]):
        (tmp_path / "bad.zip").write_bytes(content)
        with pytest.raises(errors.InputError, match="zip"):
            install(models, tmp_path / "bad.zip", place)
    # Without its first bytes, the first entry is said to begin before the archive does.
    (tmp_path / "bad.zip").write_bytes(pack(source, tmp_path / "whole.zip").read_bytes()[10:])
    with pytest.raises(errors.InputError, match="bad.zip is damaged"):
        install(models, tmp_path / "bad.zip", place)
    whole = bytearray(pack(source, tmp_path / "whole.zip").read_bytes())
    whole[1500:1600] = bytes(100)
    (tmp_path / "bad.zip").write_bytes(whole)
    with pytest.raises(errors.InputError, match="damaged|SHA-256|recorded|missing"):
        install(models, tmp_path / "bad.zip", place)
    with pytest.raises(errors.InputError, match="bundle.json is missing"):
        install(models, pack(make(tmp_path / "deep" / "er"), tmp_path / "deep.zip", "a/b/"), place)
    assert left_in(place) == [] and not (tmp_path / "outside.json").exists()


def test_a_bomb_is_not_unpacked_beyond_what_is_recorded(models, errors, tmp_path):
    source = make(tmp_path / "source", {"unet/config.json": bytes(50 * 2**20)})
    bundle = json.loads((source / "bundle.json").read_text())
    bundle["files"]["unet/config.json"]["size"] = 1000
    (source / "bundle.json").write_text(json.dumps(bundle))
    archive = pack(source, tmp_path / "bomb.zip")
    assert archive.stat().st_size < 10**5
    with pytest.raises(errors.InputError, match="recorded 1000 bytes"):
        install(models, archive, tmp_path / "models")


def test_links_of_a_folder_do_not_lead_out_of_it(models, errors, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_bytes(b"{}")
    source = make(tmp_path / "source")
    (source / "unet" / "config.json").unlink()
    os.symlink(secret, source / "unet" / "config.json")
    with pytest.raises(errors.InputError, match="a link that leads out"):
        install(models, source, tmp_path / "models")


def test_cancel_leaves_nothing(models, errors, tmp_path):
    cancel = threading.Event()
    with pytest.raises(errors.Cancelled):
        models.install(str(make(tmp_path / "source")), tmp_path / "models", lambda *news: cancel.set(), cancel)
    assert left_in(tmp_path / "models") == []


def test_what_a_killed_installation_left_is_swept_away(models, tmp_path):
    place = tmp_path / "models"
    for name, age in ((".old", 3 * 24 * 3600), (".running", 0)):
        (place / name).mkdir(parents=True)
        os.utime(place / name, times=(10**9, (place / name).stat().st_mtime - age))
    model = install(models, make(tmp_path / "source"), place)
    assert left_in(place) == [".running", model.name]


def test_the_hub_is_asked_only_where_blender_may_go_online(models, errors, tmp_path, monkeypatch):
    source, place, asked = make(tmp_path / "source"), tmp_path / "models", []

    def stream(name):
        asked.append(name)
        return open(source / name, "rb")

    monkeypatch.setattr(models, "hub_files", lambda hub_id: stream)
    with pytest.raises(errors.InputError, match="may not go online"):
        install(models, "someone/model", place)
    assert asked == []
    model = install(models, "someone/model", place, online=True)
    assert asked[0] == "bundle.json" and len(asked) == 4 and left_in(place) == [model.name]

    def fail(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(models, "hub_files", lambda hub_id: fail)
    with pytest.raises(errors.WorkError, match="cannot be downloaded: no route to host"):
        install(models, "someone/other", place, online=True)
    assert left_in(place) == [model.name]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, as the hub's library asks it; `sent` counts the bytes of each file that left it."""
    from huggingface_hub import close_session, constants

    folder, sent = make(tmp_path / "hub"), Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/api/models/someone/model/tree/main"):
                below = folder / self.path.partition("?")[0].partition("/tree/main")[2].strip("/")
                found = [(path, "directory" if path.is_dir() else "file") for path in below.iterdir()]
                return self.answer(
                    json.dumps(
                        [{"path": path.relative_to(folder).as_posix(), "type": kind, "oid": "0", "size": 0} for path, kind in found]
                    ).encode()
                )
            if self.path.startswith("/api/"):
                return self.answer(json.dumps({"id": "someone/model", "sha": "0" * 40, "siblings": []}).encode())
            name = self.path.partition("/resolve/main/")[2]
            return self.answer((folder / name).read_bytes(), name) if (folder / name).is_file() else self.send_error(404)

        def answer(self, content, name=""):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            try:
                for start in range(0, len(content), 2**16):
                    self.wfile.write(content[start : start + 2**16])
                    sent[name] += len(content[start : start + 2**16])
            except OSError:  # the other end has read enough
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield SimpleNamespace(folder=folder, sent=sent)
    close_session()
    server.shutdown()
    server.server_close()


LARGE = 64 * 2**20  # beyond what sockets hold on the way


def test_a_hub_model_is_read_as_it_comes(models, hub, tmp_path):
    model = install(models, "someone/model", tmp_path / "models", online=True)
    assert left_in(tmp_path / "models") == [model.name]
    assert (model.folder / "unet" / "weights.safetensors").read_bytes() == (hub.folder / "unet" / "weights.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["bundle.json", "unet/weights.safetensors"])
def test_no_more_is_downloaded_than_a_model_says(models, errors, hub, tmp_path, name):
    with open(hub.folder / name, "ab") as file:
        file.write(b" " * LARGE)
    with pytest.raises(errors.InputError, match="too large" if name == "bundle.json" else "recorded 1280000 bytes"):
        install(models, "someone/model", tmp_path / "models", online=True)
    assert left_in(tmp_path / "models") == []
    assert hub.sent[name] < LARGE / 2


def test_a_download_is_cancelled_within_a_file(models, errors, hub, tmp_path):
    make(hub.folder, {"unet/weights.safetensors": bytes(LARGE)})
    cancel = threading.Event()
    with pytest.raises(errors.Cancelled):
        models.install("someone/model", tmp_path / "models", lambda stage, *_: stage == "Installing" and cancel.set(), cancel, online=True)
    assert left_in(tmp_path / "models") == [] and hub.sent["unet/weights.safetensors"] < LARGE / 2


def test_what_the_hub_does_not_have_is_told(models, errors, hub, tmp_path):
    (hub.folder / "CREDITS.md").unlink()
    with pytest.raises(errors.WorkError, match="CREDITS.md of someone/model cannot be downloaded"):
        install(models, "someone/model", tmp_path / "models", online=True)
    assert left_in(tmp_path / "models") == []


@pytest.mark.parametrize(("source", "message"), [("", "name the folder"), ("nowhere.zip", "no model at"), ("a/b/c", "no model at")])
def test_a_source_that_is_none(models, errors, tmp_path, source, message):
    with pytest.raises(errors.InputError, match=message):
        install(models, source, tmp_path / "models", online=True)


@pytest.mark.parametrize("name", ["", "starter", "..", ".hidden", "a/b", "gone"])
def test_only_installed_models_are_removed(models, errors, tmp_path, name):
    (tmp_path / "models" / ".hidden").mkdir(parents=True)
    (tmp_path / "models" / "a" / "b").mkdir(parents=True)
    with pytest.raises(errors.InputError, match="cannot be removed|is installed"):
        models.remove(name, tmp_path / "models")
    assert left_in(tmp_path / "models") == [".hidden", "a"]


# In Blender


def test_install_choose_and_remove_by_operator(bpy, extension, models, tmp_path):
    settings = extension("blender_addon.extension")
    preferences = bpy.context.preferences.addons[settings.PACKAGE].preferences
    assert preferences.model == models.STARTER
    assert bpy.ops.gaussian_atlas.install_model(filepath=str(make(tmp_path / "source"))) == {"FINISHED"}
    folder = settings.model_folder(bpy.context)
    assert folder.parent == settings.models_folder() and folder.is_relative_to(settings.user_folder())
    assert not folder.is_relative_to(settings.FOLDER), "an update of the extension replaces its folder"
    assert preferences.model == str(folder)
    preferences.model = models.STARTER
    assert settings.model_folder(bpy.context) == settings.STARTER_MODEL
    preferences.model = str(folder)
    assert bpy.ops.gaussian_atlas.remove_model(name=folder.name) == {"FINISHED"}
    assert not folder.exists() and preferences.model_path == "", "the choice falls back to the starter"
    with pytest.raises(RuntimeError, match="no model"):
        bpy.ops.gaussian_atlas.remove_model(name="gone")


def test_a_bad_model_is_one_line_with_what_to_do(bpy, extension, tmp_path):
    source = make(tmp_path / "source")
    spoil(source, "altered")
    with pytest.raises(RuntimeError, match="damaged or was altered"):
        bpy.ops.gaussian_atlas.install_model(filepath=str(source))
    assert bpy.app.online_access is False
    with pytest.raises(RuntimeError, match="may not go online"):
        bpy.ops.gaussian_atlas.install_model(filepath="someone/model")
    assert bpy.context.window_manager.gaussian_atlas.fix_operator == "gaussian_atlas.open_network_preferences"


def test_an_installed_model_generates(bpy, extension, tmp_path):
    from tests.tiny_bundle import write_tiny_bundle

    bpy.ops.gaussian_atlas.install_model(filepath=str(pack(write_tiny_bundle(tmp_path / "tiny"), tmp_path / "tiny.zip")))
    folder = extension("blender_addon.extension").model_folder(bpy.context)
    assert bpy.ops.gaussian_atlas.generate(prompt="a chair", steps=2) == {"FINISHED"}
    assert bpy.context.active_object.gaussian_atlas.model_name == "tiny"
    bpy.ops.gaussian_atlas.remove_model(name=folder.name)
    assert not extension("blender_addon.service").is_loaded()


def test_models_from_the_command_line(bpy, extension, models, tmp_path, capfd):
    main = extension("blender_addon.batch").main
    assert main(["models", "install", str(pack(make(tmp_path / "source"), tmp_path / "model.zip"))]) == 0
    name = capfd.readouterr().out.partition(":")[0]
    assert main(["models"]) == 0
    listed = capfd.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in listed] == [models.STARTER, name]
    assert "Test Model 1.0, CC0-1.0, 1 MB" in listed[1]
    assert main(["models", "remove", name]) == 0
    for arguments in (["remove", name], ["install", "someone/model"], ["install"], ["explode"]):
        assert main(["models", *arguments]) == 2
        assert len(capfd.readouterr().err.strip().splitlines()) == 1
