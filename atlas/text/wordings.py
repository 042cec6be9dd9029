"""Wordings of questions about the atlas's facts: those of the training, and new ones for tests only.

A wording contains the name of the country, {s}, or in REVERSE the value of the fact, {v}. Some words of the new
wordings do not occur in the training. They were written before the first measurement and must not be adapted to one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wordings:
    """Wordings of one question."""

    seen: tuple[str, ...]  # used in training
    new: tuple[str, ...]  # used in tests only


NAMED: dict[str, Wordings] = {
    "continent": Wordings(
        seen=(
            "Which continent does {s} belong to?", "on which continent is {s}", "In which part of the world is {s}?",
            "{s} continent", "Where on the globe is {s}?", "Which world region is {s} in?", "{s} location in the world",
            "Is {s} in Africa or Asia?", "What continent would I fly to for {s}?", "To which landmass does {s} belong?",
            "where is {s}", "where in the world can I find {s}", "{s} which part of the globe", "what region is {s} in",
        ),
        new=(
            "Whereabouts is {s} on a world map?", "I want to locate {s} on the globe", "{s} is on which continent?",
            "Is {s} part of Europe?", "Which corner of the world is {s} in?", "geographic location of {s}",
        ),
    ),
    "capital": Wordings(
        seen=(
            "What is the capital of {s}?", "Name the capital city of {s}.", "{s} capital", "seat of government of {s}",
            "Where does the government of {s} sit?", "Which city is {s} governed from?", "main city of {s}",
            "In which city is the parliament of {s}?", "What is the most important city of {s}?",
            "administrative centre of {s}", "{s} seat of power", "Which town is the head of {s}?",
            "where do ministers of {s} meet", "city from which {s} is ruled", "Where is the president of {s} based?",
        ),
        new=(
            "Where are the ministries of {s} located?", "{s} is ruled from which city?", "government city of {s}",
            "In which town does the parliament of {s} meet?", "Where do foreign ambassadors to {s} live?",
            "which city hosts the rulers of {s}",
        ),
    ),
    "currency": Wordings(
        seen=(
            "What is the currency of {s}?", "Which money do people pay with in {s}?", "money used in {s}", "{s} money",
            "What do I pay with in {s}?", "legal tender in {s}", "Which banknotes circulate in {s}?", "{s} cash",
            "What coins do they use in {s}?", "Which cash should I bring to {s}?", "monetary unit of {s}",
            "exchange money before going to {s}", "How do I pay in shops in {s}?", "currency code of {s}",
            "in what are prices in {s} given", "what do people spend in {s}",
        ),
        new=(
            "Which notes and coins are used in {s}?", "What should I get from the exchange office before visiting {s}?",
            "legal tender of {s}", "In what are wages paid in {s}?", "what cash do shops in {s} take",
            "{s} monetary system unit",
        ),
    ),
    "population": Wordings(
        seen=(
            "How many people live in {s}?", "What is the population of {s}?", "How many inhabitants has {s}?",
            "number of residents of {s}", "headcount of {s}", "{s} population", "How populous is {s}?",
            "How many citizens does {s} have?", "size of the population in {s}", "How many souls live in {s}?",
            "number of humans in {s}", "how many folks are there in {s}", "is {s} densely settled, how many are there",
            "census of {s}", "demographics of {s}",
        ),
        new=(
            "How many residents are there in {s}?", "census figure of {s}", "What is the headcount in {s}?",
            "How many men, women and children call {s} home?", "count of citizens in {s}", "is {s} populous",
        ),
    ),
    "area": Wordings(
        seen=(
            "How many square kilometres is {s}?", "What is the area of {s}?", "What size is {s}?", "How big is {s}?",
            "How large is {s}?", "surface of {s}", "land area of {s}", "{s} size", "extent of the territory of {s}",
            "how much ground does {s} cover", "How much land does {s} have?", "is {s} big or small",
            "how wide does {s} spread", "surface area of {s} in km2", "how vast is {s}", "dimensions of {s}",
        ),
        new=(
            "How much land does {s} cover?", "How extensive is the territory of {s}?", "Is {s} a big place?",
            "{s} surface in square km", "how vast is the land of {s}", "what ground does {s} take up",
        ),
    ),
    "languages": Wordings(
        seen=(
            "Which languages are spoken in {s}?", "What languages do people speak in {s}?", "{s} language",
            "official tongue in {s}", "What do they speak in {s}?", "How do people talk in {s}?",
            "native tongue of {s}",
            "In which language are newspapers in {s} printed?", "Which tongue do I need in {s}?", "languages of {s}",
            "what should I learn to talk with people in {s}", "linguistic make-up of {s}", "idiom of {s}",
            "which words do people in {s} use to greet", "what is taught at school in {s} to read and write in",
        ),
        new=(
            "What tongues can be heard in {s}?", "Which phrasebook should I pack for {s}?", "spoken in {s}",
            "In which language do people in {s} talk?", "official idiom in {s}", "what do the locals of {s} speak",
        ),
    ),
    "neighbours": Wordings(
        seen=(
            "Which countries border {s}?", "What are the neighbours of {s}?", "countries next to {s}", "{s} borders",
            "Who shares a frontier with {s}?", "What lies around {s}?", "adjacent countries of {s}",
            "Which lands surround {s}?", "Where do I get to when I leave {s} by road?", "{s} is next to what",
            "nations touching {s}", "which states adjoin {s}", "frontiers of {s}", "who lives next door to {s}",
        ),
        new=(
            "Which states share a boundary with {s}?", "What is adjacent to {s}?", "{s} adjoining countries",
            "Who are the people of {s} next door to?", "which nations surround {s}", "land frontiers that {s} has",
        ),
    ),
    "domain": Wordings(
        seen=(
            "What is the internet domain of {s}?", "How do web addresses of {s} end?", "{s} website ending",
            "top-level domain of {s}", "TLD of {s}", "Which ending do sites from {s} have?", "web suffix of {s}",
            "{s} internet code", "Which letters close a URL from {s}?", "country code domain of {s}",
            "what comes after the dot on pages of {s}", "online addresses in {s}", "email addresses in {s} end with",
        ),
        new=(
            "What is the URL suffix of {s}?", "How do e-mail addresses from {s} end?", "ccTLD of {s}",
            "Which letters follow the last dot on a page of {s}?", "sites registered in {s} end in", "{s} web ending",
        ),
    ),
    "phone": Wordings(
        seen=(
            "What is the dialling code of {s}?", "Which telephone code has {s}?", "How do I call {s} from abroad?",
            "phone prefix of {s}", "{s} calling code", "country code for ringing {s}",
            "What do I dial before numbers in {s}?", "international prefix of {s}", "area code for {s}",
            "What number do I put first to phone {s}?",
            "ring someone in {s}", "{s} telephone", "mobile numbers from {s} begin with", "how to phone friends in {s}",
        ),
        new=(
            "Which digits come first when phoning {s}?", "prefix for ringing someone in {s}", "{s} phone country code",
            "What do telephone numbers from {s} start with?", "I need to call {s}, what do I dial?",
            "international calling prefix for {s}",
        ),
    ),
}
REVERSE: dict[str, Wordings] = {
    "capital": Wordings(
        seen=(
            "Which country has the capital {v}?", "Of which country is {v} the capital?", "{v} is the capital of what",
            "Which state is governed from {v}?", "{v} is the seat of government of which country?",
            "which country's main city is {v}",
        ),
        new=("{v} is the main city of which nation?", "Whose government sits in {v}?", "which land is ruled from {v}"),
    ),
    "currency": Wordings(
        seen=(
            "Where do people pay with the {v}?", "Which country uses the {v}?", "{v} is money of what country",
            "whose banknotes are called {v}", "In which country is the {v} legal tender?", "country with currency {v}",
        ),
        new=("Where is the {v} used in shops?", "The {v} is the cash of which nation?", "land whose coins are {v}"),
    ),
    "domain": Wordings(
        seen=(
            "Which country has the domain {v}?", "Where are websites that end in {v} from?", "whose TLD is {v}",
            "{v} is the internet ending of what country",
        ),
        new=("Which nation owns the ending {v}?", "A page ends in {v}, where is it from?"),
    ),
    "phone": Wordings(
        seen=(
            "Which country has the dialling code {v}?", "A call from {v}, where does it come from?",
            "whose phone prefix is {v}", "{v} is the calling code of what country",
        ),
        new=("Someone rang me from {v}, which nation is that?", "Which land do I reach by dialling {v}?"),
    ),
}  # fmt: skip
