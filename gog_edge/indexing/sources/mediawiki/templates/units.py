"""The units of `{{convert}}`: symbols, factors to SI units, and the units that a value is converted to by default.

Factors are exact by definition where one exists (international foot, pound, inch, gallons; NIST SP 811). Symbols and
defaults follow https://en.wikipedia.org/wiki/Help:Convert_units.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

from gog_edge.indexing.sources.mediawiki.vocabulary import words

_INCH, _POUND, _GRAVITY = 0.0254, 0.45359237, 9.80665
_FOOT, _MILE = 12 * _INCH, 5280 * 12 * _INCH
_IMPERIAL_GALLON, _US_GALLON = 0.00454609, 231 * _INCH**3
_HORSEPOWER = 550 * _POUND * _GRAVITY * _FOOT
_PSI = _POUND * _GRAVITY / _INCH**2
_BTU, _FOOT_POUND = 1055.05585262, _POUND * _GRAVITY * _FOOT
_ONE = re.compile(r"[-−]?(?:1|\d+⁄\d+)")


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit. A value in it times `scale` is the value in the SI unit; temperatures subtract `offset` first."""

    symbol: str
    kind: str
    scale: float
    default: str = ""  # codes of units, separated by spaces
    offset: float = 0.0
    inverse: bool = False  # of the quantity that others of its kind measure: L/100 km against km/L
    more_precision: bool = False  # results of whole numbers keep more digits (feet and pounds)
    singular: str = ""  # after the number 1 and fractions below it, if it differs from the symbol

    def symbol_after(self, number: str) -> str:
        """Return the symbol to write after a number: 1 acre, 1⁄2 acre, 0.5 acres."""
        return self.singular if self.singular and _ONE.fullmatch(number) else self.symbol


# One line for each kind: code, symbol unless it is the code, factor, default output.
_TABLE: dict[str, tuple[tuple[str, str, float, str], ...]] = {
    "length": (
        ("m", "", 1, "ft"), ("km", "", 1e3, "mi"), ("dm", "", 0.1, "in"), ("cm", "", 0.01, "in"),
        ("mm", "", 1e-3, "in"), ("μm", "", 1e-6, "in"), ("nm", "", 1e-9, ""), ("mi", "", _MILE, "km"),
        ("yd", "", 3 * _FOOT, "m"), ("ft", "", _FOOT, "m"), ("in", "", _INCH, "mm"), ("nmi", "", 1852, "km mi"),
        ("furlong", "furlongs", 660 * _FOOT, "m"), ("chain", "chains", 66 * _FOOT, "m"),
        ("rod", "rods", 16.5 * _FOOT, "m"), ("fathom", "fathoms", 6 * _FOOT, "ft m"),
        ("ly", "", 9.4607304725808e15, "km"), ("pc", "", 3.0856775814913673e16, "ly"), ("AU", "", 149597870700, "km"),
    ),
    "area": (
        ("m2", "m²", 1, "sqft"), ("km2", "km²", 1e6, "sqmi"), ("ha", "", 1e4, "acre"), ("cm2", "cm²", 1e-4, "sqin"),
        ("mm2", "mm²", 1e-6, "sqin"), ("sqmi", "sq mi", _MILE**2, "km2"), ("acre", "acres", 43560 * _FOOT**2, "ha"),
        ("sqyd", "sq yd", 9 * _FOOT**2, "m2"), ("sqft", "sq ft", _FOOT**2, "m2"), ("sqin", "sq in", _INCH**2, "cm2"),
        ("dunam", "dunams", 1e3, "acre"), ("rai", "rai", 1600, "m2"),
    ),
    "volume": (
        ("m3", "m³", 1, "cuft"), ("L", "", 1e-3, "impgal USgal"), ("mL", "", 1e-6, "impfloz USfloz"),
        ("cL", "", 1e-5, ""), ("dL", "", 1e-4, ""), ("hL", "", 0.1, "impgal USgal"), ("ML", "", 1e3, "impgal USgal"),
        ("km3", "km³", 1e9, "cumi"), ("cc", "cc", 1e-6, "cuin"), ("cm3", "cm³", 1e-6, "cuin"),
        ("cuft", "cu ft", _FOOT**3, "m3"), ("cuin", "cu in", _INCH**3, "cm3"), ("cuyd", "cu yd", 27 * _FOOT**3, "m3"),
        ("cumi", "cu mi", _MILE**3, "km3"), ("impgal", "imp gal", _IMPERIAL_GALLON, "L USgal"),
        ("USgal", "US gal", _US_GALLON, "L impgal"), ("impqt", "imp qt", _IMPERIAL_GALLON / 4, "mL USoz"),
        ("USqt", "US qt", _US_GALLON / 4, "mL"), ("imppt", "imp pt", _IMPERIAL_GALLON / 8, "mL"),
        ("USpt", "US pt", _US_GALLON / 8, "mL"), ("impfloz", "imp fl oz", _IMPERIAL_GALLON / 160, "mL"),
        ("USfloz", "US fl oz", _US_GALLON / 128, "mL"), ("oilbbl", "bbl", 42 * _US_GALLON, "m3"),
        ("USbeerbbl", "US bbl", 31 * _US_GALLON, "L"), ("acreft", "acre⋅ft", 43560 * _FOOT**3, "m3"),
        ("USbu", "US bu", 2150.42 * _INCH**3, "L"),
    ),
    "mass": (
        ("kg", "", 1, "lb"), ("g", "", 1e-3, "oz"), ("mg", "", 1e-6, "gr"), ("t", "", 1e3, "LT ST"),
        ("kt", "", 1e6, "LT ST"), ("Mt", "", 1e9, ""), ("lb", "", _POUND, "kg"), ("oz", "", _POUND / 16, "g"),
        ("st", "", 14 * _POUND, "lb kg"), ("LT", "long tons", 2240 * _POUND, "ST t"),
        ("ST", "short tons", 2000 * _POUND, "LT t"), ("Lcwt", "long cwt", 112 * _POUND, "lb kg"),
        ("ozt", "ozt", 0.0311034768, "g"), ("carat", "carats", 2e-4, "g"), ("gr", "gr", _POUND / 7000, "mg"),
    ),
    "speed": (
        ("km/h", "", 1 / 3.6, "mph"), ("mph", "", _MILE / 3600, "km/h"), ("m/s", "", 1, "ft/s"),
        ("ft/s", "", _FOOT, "m/s"), ("kn", "", 1852 / 3600, "km/h mph"), ("km/s", "", 1e3, "mi/s"),
        ("mi/s", "", _MILE, "km/s"), ("ft/min", "", _FOOT / 60, "m/min"), ("m/min", "", 1 / 60, "ft/min"),
    ),
    "power": (
        ("W", "", 1, "hp"), ("kW", "", 1e3, "hp"), ("MW", "", 1e6, "hp"), ("GW", "", 1e9, "hp"),
        ("hp", "", _HORSEPOWER, "kW"), ("bhp", "bhp", _HORSEPOWER, "kW"), ("shp", "shp", _HORSEPOWER, "kW"),
        ("ihp", "ihp", _HORSEPOWER, "kW"), ("PS", "PS", 75 * _GRAVITY, "hp kW"),
    ),
    "pressure": (
        ("Pa", "", 1, "psi"), ("hPa", "", 100, "inHg"), ("kPa", "", 1e3, "psi"), ("MPa", "", 1e6, "psi"),
        ("GPa", "", 1e9, "psi"), ("bar", "", 1e5, "kPa"), ("mbar", "", 100, "inHg"), ("psi", "", _PSI, "kPa"),
        ("ksi", "", 1e3 * _PSI, "MPa"), ("atm", "", 101325, "kPa"), ("mmHg", "", 133.322387415, "kPa"),
        ("inHg", "", 3386.388640341, "kPa"), ("kgf/cm2", "kgf/cm²", 1e4 * _GRAVITY, "psi"),
    ),
    "energy": (
        ("J", "", 1, "ftlbf"), ("kJ", "", 1e3, "kcal"), ("MJ", "", 1e6, "kWh"), ("GJ", "", 1e9, ""),
        ("Wh", "", 3.6e3, "kJ"), ("kWh", "", 3.6e6, "MJ"), ("MWh", "", 3.6e9, "GJ"), ("GWh", "", 3.6e12, "TJ"),
        ("TWh", "", 3.6e15, "PJ"), ("TJ", "", 1e12, ""), ("PJ", "", 1e15, ""), ("cal", "", 4.184, "J"),
        ("kcal", "", 4184, "kJ"), ("BTU", "", _BTU, "kJ"), ("ftlbf", "ft⋅lbf", _FOOT_POUND, "J"),
    ),
    "torque": (
        ("Nm", "N⋅m", 1, "lbft"), ("lbft", "lb⋅ft", _FOOT_POUND, "Nm"), ("kgm", "kg⋅m", _GRAVITY, "Nm"),
    ),
    "force": (
        ("N", "", 1, "lbf"), ("kN", "", 1e3, "lbf"), ("MN", "", 1e6, "lbf"), ("lbf", "lbf", _POUND * _GRAVITY, "N"),
        ("kgf", "kgf", _GRAVITY, "N lbf"),
    ),
    "density": (
        ("PD/km2", "/km²", 1e-6, "PD/sqmi"), ("PD/sqmi", "/sq mi", 1 / _MILE**2, "PD/km2"),
        ("PD/ha", "/ha", 1e-4, "PD/acre"), ("PD/acre", "/acre", 1 / (43560 * _FOOT**2), "PD/ha"),
    ),
    "flow": (
        ("m3/s", "m³/s", 1, "cuft/s"), ("cuft/s", "cu ft/s", _FOOT**3, "m3/s"), ("L/s", "L/s", 1e-3, "cuft/s"),
        ("m3/h", "m³/h", 1 / 3600, "cuft/h"), ("m3/d", "m³/d", 1 / 86400, "cuft/d"),
        ("oilbbl/d", "bbl/d", 42 * _US_GALLON / 86400, "m3/d"), ("cuft/d", "cu ft/d", _FOOT**3 / 86400, "m3/d"),
        ("USgal/min", "US gal/min", _US_GALLON / 60, "L/s"), ("cuft/min", "cu ft/min", _FOOT**3 / 60, "m3/min"),
    ),
    "mass density": (
        ("kg/m3", "kg/m³", 1, "lb/cuft"), ("g/cm3", "g/cm³", 1e3, "lb/cuin"),
        ("lb/cuft", "lb/cu ft", _POUND / _FOOT**3, "kg/m3"),
    ),
    "linear density": (
        ("kg/m", "", 1, "lb/yd"), ("lb/yd", "", _POUND / (3 * _FOOT), "kg/m"), ("lb/ft", "", _POUND / _FOOT, "kg/m"),
    ),
    "mass by area": (
        ("kg/m2", "kg/m²", 1, "lb/sqft"), ("lb/sqft", "lb/sq ft", _POUND / _FOOT**2, "kg/m2"),
        ("t/ha", "", 0.1, "LT/acre"), ("kg/ha", "", 1e-4, "lb/acre"),
        ("lb/acre", "", _POUND / (43560 * _FOOT**2), "kg/ha"),
    ),
    "acceleration": (
        ("m/s2", "m/s²", 1, "ft/s2"), ("ft/s2", "ft/s²", _FOOT, "m/s2"),
    ),
    "fuel": (
        ("km/L", "", 1e6, "mpgimp mpgus"), ("mpgus", "mpg‑US", _MILE / _US_GALLON, "L/100km mpgimp"),
        ("mpgimp", "mpg‑imp", _MILE / _IMPERIAL_GALLON, "L/100km mpgus"),
    ),
}  # fmt: skip
_ALIASES = """
m=metre metres meter meters; km=kilometre kilometres kilometer kilometers; cm=centimetre centimetres centimeter
centimeters;
mm=millimetre millimetres millimeter millimeters; μm=um µm; mi=mile miles; yd=yard yards; ft=foot feet; in=inch inches;
nmi=NM nauticalmile; fathom=ftm fathoms; furlong=furlongs; chain=chains ch; rod=rods; AU=au;
m2=m² sqm; km2=km² sqkm; cm2=cm²; mm2=mm²; ha=hectare hectares; acre=acres; sqmi=mi2 sqmile; sqft=ft2 ft² sqfoot;
sqin=in2; sqyd=yd2; m3=m³ cum; km3=km³; cm3=cm³; L=l litre litres liter liters; mL=ml; cL=cl; dL=dl; hL=hl; ML=Ml;
cuft=ft3;
cuin=in3 cid CID; cuyd=yd3; cumi=mi3; USgal=usgal U.S.gal gal; impgal=Impgal; oilbbl=bbl; oilbbl/d=bbl/d;
acreft=acre.ft acre·ft acre-ft;
USfloz=USoz usfloz; impfloz=impoz; kg=kilogram kilograms; g=gram grams; t=tonne tonnes MT mt; lb=lbs pound pounds;
oz=ounce ounces; st=stone; LT=longton longtons lt; ST=shortton shorttons; Lcwt=cwt; km/h=kmh kph kmph km/hr; mph=mi/h;
kn=knot knots kt/s; ft/min=fpm; hp=horsepower; kPa=kpa; psi=PSI; BTU=Btu; kcal=Cal; ftlbf=ftlb ft.lbf ft·lbf;
Nm=N.m N·m; lbft=lb.ft lb·ft lbf.ft lbfft; kgm=kg.m; lbf=lb-f; C=°C degC celsius; F=°F degF fahrenheit; K=kelvin;
PD/km2=/km2 PD/sqkm; PD/sqmi=/sqmi PD/mi2; PD/ha=/ha; PD/acre=/acre; cuft/s=ft3/s cufoot/s; L/s=l/s;
mpgus=mpgUS mpgu.s.;
L/100km=l/100km; km/L=km/l
"""
# Values of two units, as in 5 ft 10 in: the larger one, the smaller one, how many make the larger one.
_COMPOSITES = {("ft", "in"): 12, ("yd", "ft"): 3, ("mi", "yd"): 1760, ("mi", "chain"): 80,
               ("mi", "ft"): 5280, ("lb", "oz"): 16, ("st", "lb"): 14, ("LT", "Lcwt"): 20}  # fmt: skip
_COMPOSITE_OUTPUTS = {"ftin": ("ft", "in"), "lboz": ("lb", "oz"), "stlb": ("st", "lb"), "miyd": ("mi", "yd")}
_PREFIXES = {"k": "e3", "M": "e6", "G": "e9", "B": "e9", "T": "e12"}
_PREFIXED = words("oilbbl oilbbl/d bbl bbl/d cuft cuft/d USgal impgal cuyd acre ST LT lb BTU")
_MULTIPLES = {"e3": (1e3, "thousand"), "e6": (1e6, "million"), "e9": (1e9, "billion"), "e12": (1e12, "trillion")}


@cache
def _units() -> dict[str, Unit]:
    units = {code: Unit(symbol or code, kind, scale, default)
             for kind, rows in _TABLE.items() for code, symbol, scale, default in rows}  # fmt: skip
    for code, named in units.items():
        if named.symbol.endswith("s") and "/" not in named.symbol:  # acres, long tons
            units[code] = replace(named, singular=named.symbol[:-1])
    for code in ("ft", "lb"):
        units[code] = replace(units[code], more_precision=True)
    units["C"] = Unit("°C", "temperature", 1, "F", -273.15)
    units["F"] = Unit("°F", "temperature", 5 / 9, "C", 32 - 273.15 * 9 / 5)
    units["K"] = Unit("K", "temperature", 1, "C F")
    units["C-change"] = Unit("°C", "temperature change", 1, "F-change")
    units["F-change"] = Unit("°F", "temperature change", 5 / 9, "C-change")
    units["L/100km"] = Unit("L/100 km", "fuel", 1e-8, "mpgimp mpgus", inverse=True)
    for line in _ALIASES.replace("\n", " ").split(";"):
        code, _, names = line.strip().partition("=")
        units |= {name: units[code] for name in names.split()}
    return units


def unit(code: str) -> Unit | None:
    """Return a unit by its code, such as `km`, `sqmi` or `e6acre`; None if it is not known."""
    code = code.replace("\u00a0", " ").strip()
    found = _units().get(code) or _units().get(code.replace(" ", ""))
    if found is None and code[:1] in _PREFIXES and code[1:] in _PREFIXED:
        code = _PREFIXES[code[0]] + code[1:]
    if found is None:
        for prefix, (factor, word) in _MULTIPLES.items():
            base = _units().get(code.removeprefix(prefix)) if code.startswith(prefix) else None
            if base is not None and not base.offset:
                return replace(base, symbol=f"{word} {base.symbol}", scale=base.scale * factor, singular="")
    return found


def parts_of(larger: str, smaller: str) -> int:
    """Return how many of the smaller unit make the larger one in values such as 5 ft 10 in; 0 if they do not mix."""
    first, second = unit(larger), unit(smaller)
    return next((count for (one, two), count in _COMPOSITES.items() if unit(one) == first and unit(two) == second), 0)


def composite_output(code: str) -> tuple[Unit, Unit, int] | None:
    """Return larger unit, smaller unit and their ratio for output such as `ftin`; None for other codes."""
    names = _COMPOSITE_OUTPUTS.get(code.replace(" ", ""))
    if names is None:
        return None
    return _units()[names[0]], _units()[names[1]], _COMPOSITES[names]
