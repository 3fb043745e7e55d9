# SPDX-License-Identifier: Apache-2.0
"""Word lists of the exercises.

Keys and names are made of these words so that each is one or two tokens of the vericache-nano
tokenizer: looking a key up should test the cache, not the spelling.
"""

from __future__ import annotations


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS = _split(
    """
    amber anchor apple arrow aspen autumn badge bamboo barrel basil beacon berry birch blaze bloom bonus
    border bottle branch brave breeze brick bridge bright brook bubble bucket butter button cabin cactus
    camel candle canoe canyon carbon castle cedar chalk cherry chess cider circle citrus cliff clock
    cloud clover cobalt coffee comet copper coral cotton cover crane crater cream creek crimson crown
    crystal curve daisy dance dawn delta desert diamond dolphin domino dragon dream drift drum eagle
    early earth ebony echo elder ember emerald engine evening fabric falcon feather fern fiddle field
    finch flame flint flower flute forest fossil fountain fox frost galaxy garden garlic gentle ginger
    glacier glass globe golden granite grape gravel green guitar harbor harvest hazel heart hedge helmet
    heron hill hollow honey horizon hunter ice indigo iris iron island ivory ivy jade jasmine jelly
    jewel jungle juniper kettle kite knight ladder lagoon lake lamp lantern laurel lavender leaf lemon
    lily lime linen lion lizard lotus lucky lunar magnet mango maple marble market meadow melon mercy
    meteor mint mirror mist monkey moon morning moss mountain museum music nectar needle nickel night
    noble north nova nutmeg oak oasis ocean olive onyx opal orange orbit orchid otter oyster palace palm
    panda paper pearl pebble pepper piano pilot pine planet plum pocket polar pond poppy prairie prism
    puzzle quartz quiet rabbit radio rain ranger raven reef ribbon ridge river robin rocket rose royal
    ruby saddle saffron sage sail salmon sand sapphire satin scarlet shadow shell silent silk silver sky
    slate snow solar sonic south spark spice spiral spring spruce star stone storm stream summer sun
    swan swift tango teal temple thistle thunder tiger timber topaz torch tower trail tulip tundra
    turtle twilight valley vanilla velvet violet walnut water wave west whale wheat willow wind winter
    wolf wonder yellow zebra zenith zephyr
    """
)

FIRST_NAMES = _split(
    """
    Ada Alan Amir Anna Ben Carla Chen Clara Dana David Diego Elena Emma Eric Eva Felix Fiona Grace Hana
    Hugo Ines Ivan Jack Jane Jonas Julia Karim Kate Kenji Laura Leo Lina Lucas Maria Marco Maya Mila
    Nadia Nils Nora Omar Oscar Paula Peter Priya Rosa Ruth Sami Sara Simon Sofia Tara Theo Tina Tom Uma
    Vera Victor Wei Yara Yusuf Zoe
    """
)

LAST_NAMES = _split(
    """
    Adams Bauer Becker Berg Brown Castro Clark Costa Cruz Dahl Diaz Dubois Evans Fischer Fuchs Garcia
    Gomez Green Hall Hansen Haas Ito Jensen Kaya Keller Khan Kim Klein Kumar Lang Larsen Lee Lopez Lund
    Maier Martin Mora Moreau Nagy Novak Olsen Park Patel Perez Reid Rossi Roy Santos Sato Silva Singh
    Smith Stein Suzuki Tanaka Turner Vogel Wagner Walker Weber White Wolf Wong Young
    """
)

CITIES = _split(
    """
    Athens Austin Basel Berlin Boston Bristol Cairo Chicago Dallas Delhi Denver Dublin Geneva Hamburg
    Helsinki Kyoto Lima Lisbon London Lyon Madrid Milan Munich Nairobi Oslo Ottawa Paris Porto Prague
    Quito Riga Rome Seoul Sydney Tokyo Turin Vienna Warsaw York Zurich
    """
)

STREETS = _split(
    """
    Street Road Lane Avenue Square Court Drive Park
    """
)

DOMAINS = _split(
    """
    acme globex initech umbra vertex lumen quanta nimbus argon zenit
    """
)

DICT_KEYS = _split(
    """
    host port mode path user size limit level color label delay scale depth width token group
    """
)
