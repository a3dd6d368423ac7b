"""The factories of Infinigen that make everyday things, with their names in captions."""

from __future__ import annotations

from dataclasses import dataclass, field

_LEGS = {r".*(leg|limb).*": "legs"}
_HANDLE = {r".*handle.*": "handle"}


@dataclass(frozen=True)
class Factory:
    """A class of Infinigen."""

    slug: str  # in ids: letters, digits and "-"
    module: str  # below infinigen.assets.objects
    name: str  # of the class
    nouns: tuple[str, ...]  # what it makes, the plainest first, then paraphrases
    category: str
    turn: int = -90  # degrees about the vertical axis that bring its front to -Y: Infinigen's furniture looks along +X
    parts: dict[str, str] = field(default_factory=dict)  # regular expression of a material's role in the factory -> part
    details: dict[str, tuple[object, str]] = field(default_factory=dict)  # switch -> (value, what a caption then says)


_ARMS: dict[str, tuple[object, str]] = {"has_arm": (True, "armrests")}
_F = Factory
FACTORIES = (
    # seating
    _F("chair", "seating", "ChairFactory", ("chair", "dining chair"), "seating", parts=_LEGS, details=_ARMS),
    _F("bar-stool", "seating", "BarChairFactory", ("bar stool", "stool", "high stool"), "seating", parts=_LEGS),
    _F("office-chair", "seating", "OfficeChairFactory", ("office chair", "desk chair", "swivel chair"), "seating", parts=_LEGS),
    _F("sofa", "seating", "SofaFactory", ("sofa", "couch"), "seating"),
    _F("armchair", "seating", "ArmChairFactory", ("armchair", "upholstered armchair", "easy chair"), "seating"),
    _F("bed-frame", "seating", "BedFrameFactory", ("bed frame", "bed without a mattress", "bedstead"), "bedroom", parts=_LEGS),
    _F("mattress", "seating", "MattressFactory", ("mattress",), "bedroom"),
    _F("pillow", "seating", "PillowFactory", ("pillow", "cushion"), "bedroom"),
    # tables and storage
    _F("dining-table", "tables", "TableDiningFactory", ("dining table", "table"), "tables", parts=_LEGS),
    _F("coffee-table", "tables", "CoffeeTableFactory", ("coffee table", "low table"), "tables", parts=_LEGS),
    _F("side-table", "tables", "SideTableFactory", ("side table", "small table"), "tables", parts=_LEGS),
    _F("cocktail-table", "tables", "TableCocktailFactory", ("cocktail table", "bar table", "pedestal table"), "tables", parts=_LEGS),
    _F("desk", "shelves", "SimpleDeskFactory", ("desk", "writing desk", "work table"), "tables", parts=_LEGS),
    _F("drawer-desk", "shelves", "SidetableDeskFactory", ("desk with drawers", "office desk"), "tables", parts=_LEGS),
    _F("cell-shelf", "shelves", "CellShelfFactory", ("cube shelf", "shelf with compartments", "shelf"), "storage"),
    _F("tv-stand", "shelves", "TVStandFactory", ("tv stand", "low shelf", "media console"), "storage"),
    _F("shelf", "shelves", "LargeShelfFactory", ("tall shelf", "shelf", "shelving unit"), "storage"),
    _F("bookcase", "shelves", "SimpleBookcaseFactory", ("bookcase", "bookshelf"), "storage"),
    _F("cabinet", "shelves", "SingleCabinetFactory", ("cabinet", "cupboard"), "storage"),
    _F("kitchen-cabinet", "shelves", "KitchenCabinetFactory", ("kitchen cabinet", "row of kitchen cabinets"), "kitchen"),
    _F("kitchen-island", "shelves", "KitchenIslandFactory", ("kitchen island", "kitchen counter"), "kitchen"),
    _F("corner-shelf", "shelves", "TriangleShelfFactory", ("corner shelf", "triangular shelf"), "storage"),
    _F("wall-shelf", "wall_decorations", "WallShelfFactory", ("wall shelf", "floating shelf"), "storage"),
    _F("warehouse-rack", "elements.warehouses", "RackFactory", ("warehouse rack", "storage rack"), "storage"),
    _F("pallet", "elements.warehouses", "PalletFactory", ("pallet", "shipping pallet"), "storage"),
    _F("basket", "organizer", "BasketBaseFactory", ("basket", "storage basket"), "storage"),
    # kitchen and tableware
    _F("bottle", "tableware", "BottleFactory", ("bottle",), "tableware", parts={"cap_.*": "cap", "wrap_.*": "label"}),
    _F("bowl", "tableware", "BowlFactory", ("bowl", "dish"), "tableware"),
    _F("can", "tableware", "CanFactory", ("can", "tin can", "tin"), "tableware", parts={"wrap_.*": "label"}),
    _F("cup", "tableware", "CupFactory", ("cup", "mug"), "tableware"),
    _F("snack-bag", "tableware", "FoodBagFactory", ("bag of snacks", "snack bag", "bag of crisps"), "tableware"),
    _F("food-box", "tableware", "FoodBoxFactory", ("food box", "cardboard box of food", "cereal box"), "tableware"),
    _F("fork", "tableware", "ForkFactory", ("fork",), "tableware", parts={"guard_.*": "handle"}),
    _F("spoon", "tableware", "SpoonFactory", ("spoon",), "tableware", parts={"guard_.*": "handle"}),
    _F("knife", "tableware", "KnifeFactory", ("knife", "kitchen knife"), "tableware", parts={"guard_.*": "handle"}),
    _F("spatula", "tableware", "SpatulaFactory", ("spatula",), "tableware", parts={"guard_.*": "handle"}),
    _F("chopsticks", "tableware", "ChopsticksFactory", ("chopsticks", "pair of chopsticks"), "tableware"),
    _F("jar", "tableware", "JarFactory", ("jar", "storage jar"), "tableware", parts={"cap_.*": "lid"}),
    _F("pan", "tableware", "PanFactory", ("pan", "frying pan"), "tableware", parts={"guard_.*": "handle"}),
    _F("pot", "tableware", "PotFactory", ("cooking pot", "pot", "saucepan"), "tableware", parts={"guard_.*": "handles"}),
    _F("plate", "tableware", "PlateFactory", ("plate", "dinner plate"), "tableware"),
    _F("wine-glass", "tableware", "WineglassFactory", ("wine glass", "goblet", "glass with a stem"), "tableware"),
    _F("fruit-bowl", "tableware", "FruitContainerFactory", ("bowl of fruit", "fruit bowl"), "tableware"),
    _F("potted-plant", "tableware", "PlantContainerFactory", ("potted plant", "plant in a pot", "houseplant"), "plants"),
    _F("large-potted-plant", "tableware", "LargePlantContainerFactory", ("large potted plant", "tall plant in a pot"), "plants"),
    _F("vase", "table_decorations", "VaseFactory", ("vase",), "decoration"),
    # appliances and bathroom
    _F("oven", "appliances", "OvenFactory", ("oven", "stove", "kitchen stove"), "appliances", parts=_HANDLE),
    _F("microwave", "appliances", "MicrowaveFactory", ("microwave", "microwave oven"), "appliances"),
    _F("dishwasher", "appliances", "DishwasherFactory", ("dishwasher",), "appliances", parts=_HANDLE),
    _F("fridge", "appliances", "BeverageFridgeFactory", ("glass-door fridge", "drinks fridge", "fridge"), "appliances", parts=_HANDLE),
    _F("toaster", "appliances.toaster", "ToasterFactory", ("toaster",), "appliances"),
    _F("tv", "appliances", "TVFactory", ("television", "tv", "flat television"), "appliances"),
    _F("monitor", "appliances", "MonitorFactory", ("computer monitor", "monitor", "screen"), "appliances"),
    _F("range-hood", "wall_decorations", "RangeHoodFactory", ("range hood", "kitchen hood"), "appliances"),
    _F("sink", "table_decorations", "SinkFactory", ("kitchen sink", "sink with a tap"), "kitchen"),
    _F("tap", "table_decorations", "TapFactory", ("tap", "faucet"), "kitchen"),
    _F("washbasin", "bathroom", "BathroomSinkFactory", ("washbasin", "bathroom sink"), "bathroom"),
    _F("pedestal-sink", "bathroom", "StandingSinkFactory", ("pedestal sink", "standing washbasin"), "bathroom"),
    _F("bathtub", "bathroom", "BathtubFactory", ("bathtub", "tub"), "bathroom"),
    _F("toilet", "bathroom", "ToiletFactory", ("toilet",), "bathroom"),
    # lamps
    _F("desk-lamp", "lamp", "DeskLampFactory", ("desk lamp", "table lamp", "lamp"), "lamps"),
    _F("floor-lamp", "lamp", "FloorLampFactory", ("floor lamp", "standing lamp", "lamp"), "lamps"),
    _F("pendant-lamp", "lamp", "CeilingClassicLampFactory", ("pendant lamp", "hanging lamp", "ceiling lamp"), "lamps"),
    _F("ceiling-light", "lamp", "CeilingLightFactory", ("ceiling light", "round ceiling lamp"), "lamps"),
    # house and decoration
    _F("door", "elements.doors", "PanelDoorFactory", ("door", "panel door"), "house", turn=0, parts=_HANDLE),
    _F("glass-door", "elements.doors", "GlassPanelDoorFactory", ("glass door", "door with a glass panel"), "house", turn=0, parts=_HANDLE),
    _F("louvre-door", "elements.doors", "LouverDoorFactory", ("louvre door", "slatted door"), "house", turn=0, parts=_HANDLE),
    _F("window", "windows", "WindowFactory", ("window",), "house", turn=0),
    _F("pillar", "elements.pillars", "PillarFactory", ("pillar", "column"), "house"),
    _F("spiral-staircase", "elements.staircases.spiral", "SpiralStaircaseFactory", ("spiral staircase", "winding stairs"), "house"),
    _F("staircase", "elements.staircases.straight", "StraightStaircaseFactory", ("staircase", "stairs", "straight stairs"), "house"),
    _F("rug", "elements.rug", "RugFactory", ("rug", "carpet"), "decoration"),
    _F("mirror", "wall_decorations", "MirrorFactory", ("wall mirror", "mirror"), "decoration", parts={"frame_.*": "frame"}),
    _F("painting", "wall_decorations", "WallArtFactory", ("painting", "framed picture"), "decoration", parts={"frame_.*": "frame"}),
    _F("balloon", "wall_decorations", "BalloonFactory", ("letter balloon", "foil balloon in the shape of a letter"), "decoration"),
    _F("book", "table_decorations", "BookFactory", ("book",), "decoration"),
    _F("book-stack", "table_decorations", "BookStackFactory", ("stack of books", "pile of books"), "decoration"),
    _F("row-of-books", "table_decorations", "BookColumnFactory", ("row of books", "books side by side"), "decoration"),
    _F("aquarium", "decor", "AquariumTankFactory", ("aquarium", "fish tank"), "decoration"),
    # clothes
    _F("trousers", "clothes", "PantsFactory", ("trousers", "pants", "pair of trousers"), "clothes"),
    _F("towel", "clothes", "TowelFactory", ("folded towel", "towel"), "clothes"),
    _F("blanket", "clothes", "BlanketFactory", ("blanket",), "clothes"),
    # fruit
    _F("apple", "fruits", "FruitFactoryApple", ("apple",), "fruit"),
    _F("blackberry", "fruits", "FruitFactoryBlackberry", ("blackberry",), "fruit"),
    _F("green-coconut", "fruits", "FruitFactoryCoconutgreen", ("green coconut", "young coconut"), "fruit"),
    _F("coconut", "fruits", "FruitFactoryCoconuthairy", ("coconut", "hairy coconut"), "fruit"),
    _F("durian", "fruits", "FruitFactoryDurian", ("durian", "spiky fruit"), "fruit"),
    _F("pineapple", "fruits", "FruitFactoryPineapple", ("pineapple",), "fruit"),
    _F("starfruit", "fruits", "FruitFactoryStarfruit", ("starfruit", "carambola"), "fruit"),
    _F("strawberry", "fruits", "FruitFactoryStrawberry", ("strawberry",), "fruit"),
    # plants
    _F("globular-cactus", "cactus.generate", "GlobularCactusFactory", ("round cactus", "barrel cactus", "cactus"), "plants"),
    _F("columnar-cactus", "cactus.generate", "ColumnarCactusFactory", ("tall cactus", "columnar cactus", "cactus"), "plants"),
    _F("fern", "small_plants", "FernFactory", ("fern", "plant"), "plants"),
    _F("snake-plant", "small_plants", "SnakePlantFactory", ("snake plant", "plant with upright leaves"), "plants"),
    _F("spider-plant", "small_plants", "SpiderPlantFactory", ("spider plant", "plant with long leaves"), "plants"),
    _F("succulent", "small_plants", "SucculentFactory", ("succulent", "succulent plant"), "plants"),
    _F("flower", "grassland", "FlowerFactory", ("flower", "blossom"), "plants"),
    _F("flowering-plant", "grassland", "FlowerPlantFactory", ("flowering plant", "plant with flowers"), "plants"),
    _F("dandelion", "grassland", "DandelionFactory", ("dandelion",), "plants"),
    _F("grass", "grassland", "GrassTuftFactory", ("tuft of grass", "grass"), "plants"),
    _F("mushroom", "mushroom.generate", "MushroomFactory", ("mushroom", "cluster of mushrooms"), "plants"),
    _F("agave", "monocot.generate", "AgaveMonocotFactory", ("agave", "agave plant"), "plants"),
    _F("maize", "monocot.generate", "MaizeMonocotFactory", ("maize plant", "corn plant"), "plants"),
    _F("wheat", "monocot.generate", "WheatMonocotFactory", ("wheat", "ears of wheat"), "plants"),
    _F("taro", "monocot.generate", "TaroMonocotFactory", ("taro plant", "plant with large leaves"), "plants"),
    _F("banana-plant", "monocot.generate", "BananaMonocotFactory", ("banana plant", "plant with broad leaves"), "plants"),
    _F("pine-cone", "monocot.pinecone", "PineconeFactory", ("pine cone", "fir cone"), "plants"),
    _F("palm-plant", "tropic_plants", "LeafPalmPlantFactory", ("palm leaf", "fan palm leaf"), "plants"),
    _F("tree", "trees", "TreeFactory", ("tree",), "trees"),
    _F("bush", "trees", "BushFactory", ("bush", "shrub"), "trees"),
    _F("tree-stump", "deformed_trees.generate", "DeformedTreeFactory", ("dead tree trunk", "old tree trunk", "log"), "trees"),
    _F("maple-leaf", "leaves.leaf_maple", "LeafFactoryMaple", ("maple leaf", "leaf"), "plants"),
    _F("ginkgo-leaf", "leaves.leaf_ginko", "LeafFactoryGinko", ("ginkgo leaf", "leaf"), "plants"),
    # the sea
    _F("brain-coral", "corals.generate", "BrainCoralFactory", ("brain coral", "coral"), "sea"),
    _F("fan-coral", "corals.generate", "FanCoralFactory", ("fan coral", "sea fan", "coral"), "sea"),
    _F("elkhorn-coral", "corals.generate", "ElkhornCoralFactory", ("elkhorn coral", "coral"), "sea"),
    _F("table-coral", "corals.generate", "TableCoralFactory", ("table coral", "coral"), "sea"),
    _F("tube-coral", "corals.generate", "TubeCoralFactory", ("tube coral", "coral"), "sea"),
    _F("star-coral", "corals.generate", "StarCoralFactory", ("star coral", "coral"), "sea"),
    _F("leather-coral", "corals.generate", "LeatherCoralFactory", ("leather coral", "folded coral", "coral"), "sea"),
    _F("cauliflower-coral", "corals.generate", "CauliflowerCoralFactory", ("cauliflower coral", "coral"), "sea"),
    _F("bush-coral", "corals.generate", "BushCoralFactory", ("branching coral", "coral"), "sea"),
    _F("kelp", "monocot.kelp", "KelpMonocotFactory", ("kelp", "seaweed"), "sea"),
    _F("sea-urchin", "underwater.urchin", "UrchinFactory", ("sea urchin", "urchin"), "sea"),
    _F("scallop", "mollusk.generate", "ScallopFactory", ("scallop shell", "seashell"), "sea"),
    _F("clam", "mollusk.generate", "ClamFactory", ("clam", "clam shell", "seashell"), "sea"),
    _F("mussel", "mollusk.generate", "MusselFactory", ("mussel", "mussel shell"), "sea"),
    _F("conch", "mollusk.generate", "ConchFactory", ("conch", "conch shell", "sea snail shell"), "sea"),
    _F("auger-shell", "mollusk.generate", "AugerFactory", ("auger shell", "pointed spiral shell"), "sea"),
    _F("volute-shell", "mollusk.generate", "VoluteFactory", ("volute shell", "sea snail shell"), "sea"),
    _F("nautilus", "mollusk.generate", "NautilusFactory", ("nautilus", "nautilus shell", "spiral shell"), "sea"),
    # animals
    _F("fish", "creatures", "FishFactory", ("fish",), "animals"),
    _F("crab", "creatures", "CrabFactory", ("crab",), "animals"),
    _F("lobster", "creatures", "LobsterFactory", ("lobster",), "animals"),
    _F("jellyfish", "creatures", "JellyfishFactory", ("jellyfish",), "animals"),
    _F("bird", "creatures", "BirdFactory", ("bird",), "animals"),
    _F("flying-bird", "creatures", "FlyingBirdFactory", ("flying bird", "bird with spread wings"), "animals"),
    _F("beetle", "creatures", "BeetleFactory", ("beetle", "insect"), "animals"),
    _F("dragonfly", "creatures", "DragonflyFactory", ("dragonfly", "insect"), "animals"),
    _F("predator", "creatures", "CarnivoreFactory", ("big cat", "predator", "four-legged animal"), "animals"),
    _F("herbivore", "creatures", "HerbivoreFactory", ("four-legged animal", "deer-like animal"), "animals"),
    _F("snake", "creatures", "SnakeFactory", ("snake",), "animals"),
    _F("lizard", "creatures", "LizardFactory", ("lizard",), "animals"),
    _F("frog", "creatures", "FrogFactory", ("frog",), "animals"),
    _F("boulder", "rocks.boulder", "BoulderFactory", ("boulder", "rock", "large stone"), "nature"),
)
