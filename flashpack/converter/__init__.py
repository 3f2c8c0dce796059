"""Offline: a Hugging Face checkpoint becomes a pack, and a pack is kept: proven, mended, stored another way.

``convert`` = open the source, plan, execute.
"""

from flashpack.converter.against import against
from flashpack.converter.convert import convert, plan
from flashpack.converter.options import Options
from flashpack.converter.plan import Plan
from flashpack.converter.recode import recode
from flashpack.converter.repair import repair
from flashpack.converter.report import Report

__all__ = ["Options", "Plan", "Report", "against", "convert", "plan", "recode", "repair"]
