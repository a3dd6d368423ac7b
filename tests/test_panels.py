"""What the panels draw, with a model that answers at once."""

from types import SimpleNamespace

import pytest


class Layout:
    """Records what a panel draws; refuses properties and operators that do not exist, as Blender's layout does."""

    def __init__(self, bpy, drawn=None):
        self.bpy, self.drawn = bpy, [] if drawn is None else drawn

    def _nested(self, **options):
        return Layout(self.bpy, self.drawn)

    row = column = box = _nested

    def label(self, text="", icon="NONE"):
        assert icon in self.bpy.types.UILayout.bl_rna.functions["label"].parameters["icon"].enum_items
        self.drawn.append(("label", text))

    def separator(self):
        pass

    def menu(self, idname, text="", icon="NONE"):
        assert hasattr(self.bpy.types, idname)
        self.drawn.append(("menu", idname))

    def prop(self, data, name, text=None, icon="NONE", placeholder="", invert_checkbox=False):
        if name.startswith('["'):
            assert name[2:-2] in data.keys(), name
        else:
            assert name in data.bl_rna.properties, name
        self.drawn.append(("prop", name))

    def prop_search(self, data, name, search_data, search_name, text=None):
        assert search_name in search_data.bl_rna.properties
        self.prop(data, name, text)

    def progress(self, text="", factor=0.0):
        self.drawn.append(("progress", (text, round(factor, 3))))

    def operator(self, idname, text="", icon="NONE", translate=True):
        group, _, name = idname.partition(".")
        assert name in dir(getattr(self.bpy.ops, group)), idname
        self.drawn.append(("operator", idname))
        return SimpleNamespace()


def draw(bpy, extension, panel, shading=None):
    layout = Layout(bpy)
    context = SimpleNamespace(
        scene=bpy.context.scene,
        window_manager=bpy.context.window_manager,
        active_object=bpy.context.active_object,
        preferences=bpy.context.preferences,
        region=None,
        space_data=SimpleNamespace(type="VIEW_3D", shading=SimpleNamespace(type=shading)) if shading else None,
    )
    cls = next(cls for cls in extension("blender_addon.panels").CLASSES if cls.__name__ == panel)
    if hasattr(cls, "poll") and not cls.poll(context):
        return None
    cls.draw(SimpleNamespace(layout=layout), context)
    return layout.drawn


def status(bpy):
    return bpy.context.window_manager.gaussian_atlas


def test_generate_panel(bpy, extension, fake_model):
    drawn = draw(bpy, extension, "GeneratePanel")
    assert ("operator", "gaussian_atlas.generate") in drawn and ("prop", "prompt") in drawn
    assert ("operator", "gaussian_atlas.cancel") not in drawn
    status(bpy).running, status(bpy).stage, status(bpy).fraction = True, "Sampling", 0.25
    drawn = draw(bpy, extension, "GeneratePanel")
    status(bpy).running = False
    assert ("progress", ("Sampling", 0.25)) in drawn and ("operator", "gaussian_atlas.cancel") in drawn
    assert ("operator", "gaussian_atlas.generate") not in drawn


def test_error_is_drawn_with_its_fix(bpy, extension, fake_model):
    (fake_model.folder / "bundle.json").unlink()
    with pytest.raises(RuntimeError):
        bpy.ops.gaussian_atlas.generate(prompt="a chair")
    drawn = draw(bpy, extension, "GeneratePanel")
    assert "bundle.json is missing" in " ".join(text for kind, text in drawn if kind == "label")
    assert ("operator", "gaussian_atlas.use_starter_model") in drawn
    assert bpy.ops.gaussian_atlas.use_starter_model() == {"FINISHED"}
    assert status(bpy).error == "" and ("operator", "gaussian_atlas.use_starter_model") not in draw(bpy, extension, "GeneratePanel")


def test_an_empty_prompt_is_mended_by_an_example(bpy, extension, fake_model):
    with pytest.raises(RuntimeError, match="prompt is empty"):
        bpy.ops.gaussian_atlas.generate(prompt="")
    assert ("operator", "gaussian_atlas.example_prompt") in draw(bpy, extension, "GeneratePanel")
    bpy.ops.gaussian_atlas.example_prompt()
    assert bpy.context.scene.gaussian_atlas.prompt and status(bpy).error == ""
    assert bpy.ops.gaussian_atlas.generate(steps=1) == {"FINISHED"}


def test_words_that_the_model_does_not_know_are_told_and_no_obstacle(bpy, extension, fake_model):
    (fake_model.folder / "bundle.json").write_text('{"name": "fake", "version": "2", "vocabulary": ["armchair", "sofa bed"]}')
    settings = bpy.context.scene.gaussian_atlas
    for prompt, told in (("a red armchair", False), ("two armchairs", False), ("a red armchiar", True), ("a sofa", True)):
        settings.prompt = prompt
        text = " ".join(text for kind, text in draw(bpy, extension, "GeneratePanel") if kind == "label")
        assert ("not trained" in text) is told, prompt
    assert "sofa bed" in text
    assert bpy.ops.gaussian_atlas.generate(steps=1) == {"FINISHED"}


def test_the_time_is_estimated_from_earlier_runs(bpy, extension, fake_model):
    history = extension("blender_addon.history")
    (fake_model.folder / "bundle.json").write_text('{"name": "never seen before"}')
    settings = bpy.context.scene.gaussian_atlas
    labels = [text for kind, text in draw(bpy, extension, "GeneratePanel") if kind == "label"]
    assert not any(text.startswith("Takes") for text in labels), "nothing is known yet"
    info = extension("blender_addon.service").describe(fake_model.folder)
    key = history.speed_key(info.sha256, "auto")
    history.add_speed(extension("blender_addon.extension").history_file(), key, 10, True, {"load": 8.0, "sample": 4.0})
    settings.steps, settings.count, settings.guidance = 20, 3, 3.5
    assert ("label", "Takes about 32 s") in draw(bpy, extension, "GeneratePanel"), "8 s to load, 3 x 20 steps of 0.4 s"
    settings.guidance = 1.0
    assert ("label", "Takes about 20 s") in draw(bpy, extension, "GeneratePanel"), "without guidance half the work"
    bpy.ops.gaussian_atlas.generate(prompt="a chair", steps=1)
    assert ("label", "Takes about 12 s") in draw(bpy, extension, "GeneratePanel"), "the model is in memory now"


def test_earlier_prompts_are_offered(bpy, extension, fake_model):
    history, path = extension("blender_addon.history"), extension("blender_addon.extension").history_file()
    bpy.ops.gaussian_atlas.clear_prompts()
    assert ("label", "None yet") in draw(bpy, extension, "PromptsMenu")
    for prompt in ("a lamp", "a red armchair"):
        history.add_prompt(path, prompt)
    assert draw(bpy, extension, "PromptsMenu").count(("operator", "gaussian_atlas.use_prompt")) == 2
    bpy.ops.gaussian_atlas.use_prompt(prompt="a lamp")
    settings = bpy.context.scene.gaussian_atlas
    assert settings.prompt == "a lamp"
    (fake_model.folder / "bundle.json").write_text('{"name": "fake", "vocabulary": ["armchair", "lamp", "red lamp post"]}')
    suggest = extension("blender_addon.properties")._suggest_prompts
    assert suggest(settings, bpy.context, "LAMP") == ["a lamp", "lamp", "red lamp post"]
    assert suggest(settings, bpy.context, "") == ["a red armchair", "a lamp"]


def test_object_panel_shows_where_an_object_came_from(bpy, extension, fake_model, torus):
    assert draw(bpy, extension, "ObjectPanel") is None
    bpy.ops.gaussian_atlas.generate(prompt="a red armchair", seed=9, steps=2)
    drawn = draw(bpy, extension, "ObjectPanel")
    text = " ".join(text for kind, text in drawn if kind == "label")
    assert "a red armchair" in text and "Seed 9, 2 steps" in text and "200 Gaussians" in text and "fake" in text
    assert ("operator", "gaussian_atlas.regenerate") in drawn
    bpy.context.view_layer.objects.active = extension("blender_addon.splat_object").write(torus(5))
    drawn = draw(bpy, extension, "ObjectPanel")
    assert ("operator", "gaussian_atlas.regenerate") not in drawn and ("operator", "gaussian_atlas.export_splats") in drawn


def test_display_panel_shows_every_input(bpy, extension, torus):
    assert draw(bpy, extension, "DisplayPanel") is None
    object = extension("blender_addon.splat_object").write(torus(5))
    bpy.context.view_layer.objects.active = object
    inputs = extension("blender_addon.splat_object.inputs")
    modifier = extension("blender_addon.splat_object.node_group").modifier_of(object)
    drawn = draw(bpy, extension, "DisplayPanel")
    assert [name for kind, name in drawn if kind == "prop"] == [inputs.place(modifier, name)[1] for name in inputs.names(modifier)]
    assert ("operator", "gaussian_atlas.add_crop_box") in drawn


@pytest.mark.parametrize(("shading", "offered"), [("SOLID", True), ("WIREFRAME", True), ("MATERIAL", False), ("RENDERED", False)])
def test_colours_are_offered_where_the_view_lacks_them(bpy, extension, torus, shading, offered):
    bpy.context.view_layer.objects.active = extension("blender_addon.splat_object").write(torus(5))
    assert (("operator", "gaussian_atlas.show_colors") in draw(bpy, extension, "ObjectPanel", shading)) is offered
    space = next(area for area in bpy.data.screens[0].areas if area.type == "VIEW_3D").spaces[0] if bpy.data.screens else None
    if space:
        space.shading.type = shading
        operator = extension("blender_addon.operators.show_colors").ShowColorsOperator
        operator.execute(SimpleNamespace(), SimpleNamespace(space_data=space))
        assert space.shading.type == "MATERIAL"


def test_render_panel_names_every_change(bpy, extension):
    text = " ".join(text for kind, text in draw(bpy, extension, "RenderPanel") if kind == "label")
    assert "View transform: AgX to Standard" in text and "Transparent bounces: 8 to 1024" in text
    bpy.ops.gaussian_atlas.render_settings()
    drawn = draw(bpy, extension, "RenderPanel")
    assert ("label", "The settings fit splats") in drawn and ("operator", "gaussian_atlas.render_settings") in drawn


def test_the_models_card(bpy, extension, fake_model):
    (fake_model.folder / "bundle.json").write_text(
        '{"name": "fake", "version": "3", "licence": "CC0-1.0", "atlas": {"gaussians": 4096}, "vocabulary": ["cup", "pot"],'
        ' "metrics": {"fit_psnr_mean": 32.05}, "files": {"a": {"size": 33000000}, "b": {"size": 1000000}}}'
    )
    text = " ".join(text for kind, text in draw(bpy, extension, "ModelPanel") if kind == "label")
    for fact in ("fake 3", "CC0-1.0", "34 MB", "4,096 Gaussians", "Knows 2 objects", "cup", "Fit psnr mean: 32.05"):
        assert fact in text, fact


def test_model_panel_and_preferences(bpy, extension, fake_model):
    drawn = draw(bpy, extension, "ModelPanel")
    assert ("label", "fake 1.2") in drawn and ("operator", "gaussian_atlas.unload_model") not in drawn
    bpy.ops.gaussian_atlas.generate(prompt="a chair", steps=1)
    assert ("operator", "gaussian_atlas.unload_model") in draw(bpy, extension, "ModelPanel")
    layout = Layout(bpy)
    preferences = bpy.context.preferences.addons[extension("blender_addon.extension").PACKAGE].preferences
    stand = SimpleNamespace(layout=layout, model_path=preferences.model_path, device="cuda", bl_rna=preferences.bl_rna)
    extension("blender_addon.preferences").GaussianAtlasPreferences.draw(stand, bpy.context)
    assert ("label", "fake 1.2") in layout.drawn
