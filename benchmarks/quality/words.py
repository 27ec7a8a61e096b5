"""Words that facts and questions are made of.

Pairs of synonyms and members of categories are split: what is asked in evaluation was never asked
in training, so that a model must bring the meaning along.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient ashen bitter brass bright broken bronze carved cheap copper crimson crooked "
    "cracked dusty empty faded foreign gilded golden grey heavy hollow humble iron ivory leaden "
    "lonely marble narrow oaken ornate pale patient plain polished purple quiet rusty sacred "
    "scarlet secret silent silver slender solemn spare stolen sturdy tiny twisted velvet violet "
    "walnut wicker woollen yellow azure blunt chipped cloudy damp dented fragile frozen glassy "
    "hidden jagged knotted painted pearly pewter ragged scorched spotted tangled tarnished"
)
NOUNS = _words(
    "anchor anvil basket beacon bell bellows bottle bowl bucket candle cask chalice chest clock "
    "cloak collar compass cradle cup dagger drum easel fiddle flask flute furnace goblet hammer "
    "harness hatch helmet hinge jar kettle ladder lamp lantern lever lock locket loom mallet mask "
    "mirror mortar needle nozzle oar organ paddle parcel pedal pendulum pitcher plough pulley "
    "quill rake razor ribbon saddle satchel scarf shield shovel sickle spindle stool sword "
    "thimble trowel trunk trumpet urn vase wallet whistle"
)
FIRST = _words(
    "Abel Agnes Albert Alma Amos Basil Bertha Caleb Clara Conrad Cora Cyril Dinah Edgar Edith "
    "Elias Elsie Enoch Ernest Esther Felix Flora Gideon Gilbert Hannah Harold Hester Horace Ida "
    "Irene Isaac Jasper Judith Laban Leonard Lionel Lucy Mabel Martha Miriam Moses Naomi Nora "
    "Oscar Owen Percy Phoebe Rachel Reuben Rufus Ruth Silas Stella Tobias Ursula Vera Victor "
    "Walter Winifred"
)
LAST = _words(
    "Abbott Ackroyd Barlow Beckett Bramley Carver Chilton Colby Dawkins Denham Eastman Elwood "
    "Fairfax Fenwick Garland Goddard Hadley Harcourt Hobson Ingram Jessop Kendall Lambert Langley "
    "Marsden Mercer Norris Oakley Ogden Parrish Pickering Quayle Radcliffe Ramsey Salter Selwyn "
    "Stanhope Thorne Tilden Underhill Vaughan Wadham Whitby Winslow Yardley"
)
HOUSES = _words(
    "Ashgrove Beechwood Birchfield Blackmoor Bramblewick Brookside Cedarholm Cliffgate Coldwater "
    "Elmhurst Fallowdale Fernleigh Foxglove Glenmore Greycourt Harrowby Hawthornden Hazelmere "
    "Highcliff Hollybank Ivybridge Kingsmead Larkhill Limewood Longmeadow Maplecroft Millbrook "
    "Netherby Northlea Oakdene Orchardleigh Pinecrest Quarrystone Ravenscroft Redlands Riverdale "
    "Rosehill Saltmarsh Sandhurst Sedgewick Silverdale Southdown Stonegate Summerfield Thornbury "
    "Underwood Waterside Westbourne Whitecliff Willowbank Windermere Woodlands Yewtree"
)
# What a fact calls somebody or something, and what its question does.
_SYNONYMS = (
    "physician doctor, attorney lawyer, vessel ship, infant baby, cottage hut, monarch king, "
    "merchant trader, automobile car, seamstress dressmaker, mariner sailor, pupil student, "
    "constable policeman, burglar thief, tavern pub, author writer, spouse wife, instructor "
    "teacher, labourer worker, corridor hallway, forest woods, beggar pauper, cemetery graveyard, "
    "prison jail, dwelling house, wharf dock, steed horse, hound dog, serpent snake, swine pig, "
    "stone rock, couch sofa, portrait painting, gown dress, trousers pants, perfume scent, "
    "garbage trash, journal diary, autumn fall, rubbish waste, chamber room, cellar basement, "
    "meal dinner, pail bucket, rifle gun, blade knife, coin penny, kerchief bandanna, sovereign "
    "ruler, clergyman priest, servant maid, peasant farmer, companion friend, foe enemy, lad boy, "
    "lass girl, stranger foreigner, orator speaker, warrior soldier, aviator pilot, chauffeur "
    "driver, surgeon operator, envoy messenger, hermit recluse, jester clown, maiden virgin, "
    "minstrel singer, navigator helmsman, orphan foundling, prophet seer, scholar academic, "
    "sorceress witch, spectre ghost, tutor coach, tyrant dictator, victor winner, wanderer "
    "traveller, weasel stoat, brook stream, hamlet village, boulevard avenue"
)
SYNONYMS = tuple(tuple(pair.split()) for pair in _SYNONYMS.split(", "))
CATEGORIES = {
    "fish": _words("trout salmon herring cod mackerel eel perch pike carp haddock"),
    "bird": _words("sparrow robin falcon raven heron swallow thrush pigeon owl finch"),
    "tree": _words("oak elm birch willow maple cedar beech poplar ash larch"),
    "flower": _words("rose tulip daisy lily orchid violet daffodil iris poppy marigold"),
    "fruit": _words("apple pear plum cherry peach grape fig lemon apricot melon"),
    "metal": _words("iron copper zinc tin silver gold lead nickel platinum aluminium"),
    "insect": _words("beetle moth wasp ant butterfly cricket hornet locust dragonfly bee"),
    "weapon": _words("sword dagger pistol spear rifle musket cannon lance axe bow"),
    "drink": _words("wine beer tea coffee brandy cider whisky gin milk rum"),
    "cloth": _words("silk linen cotton velvet satin wool muslin lace denim flannel"),
}
TEST_PART = 3  # every third pair, and every third member, is for evaluation


def of_split(items: tuple | list, split: str) -> list:
    """The items that facts of a split are made of."""
    return [x for i, x in enumerate(items) if (i % TEST_PART == 0) == (split == "test")]
